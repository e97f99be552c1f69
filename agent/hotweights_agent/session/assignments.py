"""Whose word counts for what pods are to serve and what the node is to hold.

The API server's while it answers; the last that it said while it does not; and the disk's memory
for pods that it said nothing about. A lower token never undoes a higher one, wherever it comes
from: an assignment that is older than what the disk remembers is refused and named. Pure; what is
to be written to the disk is given back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hotweights_crds.nodeweights import UNASSIGNED, NodeWeightsSpec, PodAssignment, StageItem


@dataclass(frozen=True, slots=True)
class SavedAssignment:
    """The last assignment of one pod, and the versions that it needs."""

    assignment: PodAssignment
    stage: tuple[StageItem, ...] = ()

    @property
    def uid(self) -> str:
        return self.assignment.uid

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {
            "assignment": self.assignment.to_dict(),
            "stage": [item.to_dict() for item in self.stage],
        }

    @classmethod
    def from_dict(cls, body: Any) -> SavedAssignment:
        """From the file. Raises `ValueError` or `TypeError` when it is something else."""
        if not isinstance(body, dict) or not isinstance(body.get("stage", []), list):
            raise TypeError("a remembered pod is an object with a list `stage`")
        return cls(
            PodAssignment.from_dict(body.get("assignment") or {}),
            tuple(StageItem.from_dict(item) for item in body.get("stage", [])),
        )


class Assignments:
    """What was said last, and by whom."""

    def __init__(self) -> None:
        self.pods: Mapping[str, PodAssignment] = {}
        """By pod UID: what the API server said, without what was refused."""
        self.stale: Mapping[str, int] = {}
        """Pod UID → the lower token that was refused."""
        self.generation = 0
        self._spec: NodeWeightsSpec | None = None  # None until the API server has said anything
        self._api_away = False
        self._memory: dict[str, SavedAssignment] = {}

    @property
    def heard(self) -> bool:
        """Whether the API server has said anything since the start."""
        return self._spec is not None

    @property
    def known(self) -> bool:
        """Whether there is any word to go by; before that nothing is fetched, let go of or told."""
        return self.heard or self._api_away

    def of(self, uid: str) -> PodAssignment | None:
        """What a pod is to serve; None while nobody has said."""
        listed = self.pods.get(uid)
        if listed is not None:
            return listed
        remembered = self._memory.get(uid)
        return remembered.assignment if remembered is not None and self._api_away else None

    def stage(self) -> dict[str, StageItem]:
        """Versions to hold: what is listed; without any word from the API server, what pods were to
        serve.
        """
        if self._spec is not None:
            return _stage_items(self._spec)
        return {item.digest: item for pod in self._memory.values() for item in pod.stage}

    def version_names(self) -> dict[str, str]:
        """Names of versions, by digest, as far as they are known."""
        names = {item.digest: item.version for pod in self._memory.values() for item in pod.stage}
        names |= {pod.assignment.digest: pod.assignment.version for pod in self._memory.values()}
        if self._spec is not None:
            names |= {digest: item.version for digest, item in _stage_items(self._spec).items()}
        return {digest: name for digest, name in names.items() if digest and name}

    def load(self, pods: Iterable[SavedAssignment]) -> None:
        """What the disk remembers, at the start."""
        self._memory = {pod.uid: pod for pod in pods}

    def api_is_away(self) -> None:
        """The API server does not answer."""
        self._api_away = True

    def assigned(self, spec: NodeWeightsSpec, generation: int) -> tuple[SavedAssignment, ...]:
        """The API server has spoken; gives what is news for the disk."""
        self._spec, self._api_away, self.generation = spec, False, generation
        pods: dict[str, PodAssignment] = {}
        stale: dict[str, int] = {}
        for offered in _best_of(spec):
            known = self._memory.get(offered.uid)
            # an operator that lost its numbers must not undo what engines have been told since
            if known is not None and offered.token < known.assignment.token:
                stale[offered.uid] = offered.token
                pods[offered.uid] = known.assignment
            else:
                pods[offered.uid] = offered
        self.pods, self.stale = pods, stale
        items = _stage_items(spec)
        # what was refused must not overwrite the token by which it was refused
        news = [self._saved(pod, items) for uid, pod in pods.items() if uid not in stale]
        new = tuple(pod for pod in news if self._memory.get(pod.uid) != pod)
        self._memory.update({pod.uid: pod for pod in new})
        return new

    def present(self, uids: Collection[str]) -> tuple[str, ...]:
        """Only these pods are left; gives those that the disk can forget. A listed one may be too
        new to have been seen.
        """
        gone = tuple(uid for uid in self._memory if uid not in uids and uid not in self.pods)
        for uid in gone:
            del self._memory[uid]
        return gone

    @staticmethod
    def _saved(pod: PodAssignment, items: Mapping[str, StageItem]) -> SavedAssignment:
        return SavedAssignment(
            pod, tuple(items[digest] for digest in (pod.digest, pod.prepare) if digest in items)
        )


def _best_of(spec: NodeWeightsSpec) -> list[PodAssignment]:
    """One assignment for each pod: where two name it, the higher token; among equals a rollout goes
    before none.
    """
    best: dict[str, tuple[tuple[int, bool], PodAssignment]] = {}
    # sorted, so that between two rollouts with equal tokens the same one counts every time
    for rollout in sorted(spec.rollouts, key=lambda r: r.uid):
        for pod in rollout.pods:
            rank = (pod.token, rollout.uid != UNASSIGNED)
            if pod.uid not in best or rank > best[pod.uid][0]:
                best[pod.uid] = (rank, pod)
    return [pod for _, pod in best.values()]


def _stage_items(spec: NodeWeightsSpec) -> dict[str, StageItem]:
    return {item.digest: item for rollout in spec.rollouts for item in rollout.stage}
