"""What every pod is to serve, now.

Before any pod of a revision changes, every pod that can must have prepared the version: what does not fit is refused while
everything serves on. Then the budget decides how many change at once. A pod that is new (it has never been of service, or its
engine boots and asks) takes nothing from anybody: it is given the rollout's version at once and boots into it; while the rollout
holds still, it is given the version that was last complete. What every other pod has, it keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hotweights_crds.nodeweights import PodAssignment
from hotweights_crds.weightrollout import VersionStatus, WeightRolloutSpec
from hotweights_operator import budget
from hotweights_operator.failures import Failures
from hotweights_operator.model import SETTLED_PHASES
from hotweights_operator.targets import Target

_REVERTIBLE = frozenset({"Refused", "Failed", "Dirty"})


@dataclass(frozen=True, slots=True)
class Course:
    """What the rollout is at."""

    target: VersionStatus
    fallback: VersionStatus  # for new pods while the rollout holds still: what was last complete
    prepares: Literal["All", "Kept", "None"]  # which engines prepare the target: all, those that do, none
    activates: bool  # may pods change to it
    gives_up: bool  # are pods that failed set back to what they serve


@dataclass(frozen=True, slots=True)
class Choice:
    """What every pod is to serve and to prepare, and which of them are told to change just now."""

    digests: Mapping[str, str]  # pod UID → digest; pods about which nothing is known are left out
    prepares: Mapping[str, str]
    activated: frozenset[str]


def choose(spec: WeightRolloutSpec, course: Course, targets: Sequence[Target], failures: Failures) -> Choice:
    """Decide for all pods."""
    digests: dict[str, str] = {}
    for target in targets:
        digest = _kept(target, course)
        if digest is not None:
            digests[target.pod.uid] = digest
    if course.gives_up:
        digests.update(_set_back(targets, course, failures))
    activated = _activate(spec, course, targets, failures) if course.activates else []
    digests.update(dict.fromkeys(activated, course.target.digest))
    prepares = {t.pod.uid: found for t in targets if (found := _prepare(t, digests.get(t.pod.uid), course))}
    return Choice(digests, prepares, frozenset(activated))


def _prepare(target: Target, digest: str | None, course: Course) -> str:
    """What the pod is to prepare beside what it serves."""
    match course.prepares:
        case "None":
            wanted = ""
        case "Kept":
            wanted = target.assigned.prepare if target.assigned else ""
        case "All":
            wanted = course.target.digest
    return wanted if digest is not None and wanted != digest else ""


def _kept(target: Target, course: Course) -> str | None:
    """What the pod has, or is given because it has nothing. None while that cannot be known."""
    engine = target.engine
    if target.assigned is not None and not _is_adrift(target):
        return target.assigned.digest
    if engine is not None and engine.phase in SETTLED_PHASES:
        return engine.digest
    if not target.pod.was_ready or (engine is not None and engine.phase == "Booting"):
        return course.target.digest if course.activates else course.fallback.digest
    return None


def _is_adrift(target: Target) -> bool:
    """Whether the pod's order is of no use: it has not been of service yet, or it boots into what cannot come any more."""
    engine, assigned = target.engine, target.assigned
    if engine is not None and engine.phase not in ("Booting", "Disconnected"):
        return False
    if not target.pod.was_ready:
        return True
    if engine is None or engine.phase != "Booting" or assigned is None or not assigned.digest or target.state is None:
        return False
    staged = target.state.staged(assigned.digest)
    listed = any(item.digest == assigned.digest for entry in target.state.spec.rollouts for item in entry.stage)
    return not listed or (staged is not None and staged.phase == "Failed")


def _set_back(targets: Sequence[Target], course: Course, failures: Failures) -> dict[str, str]:
    """Pods that could not change: what they serve, so that they are Ready again, or what repairs them."""
    back: dict[str, str] = {}
    for target in targets:
        engine = target.engine
        if engine is None or target.pod.uid not in failures.failed or not target.outstanding:
            continue
        if target.assigned is None or target.assigned.digest != course.target.digest:
            continue
        if engine.phase in _REVERTIBLE:
            back[target.pod.uid] = course.fallback.digest if engine.phase == "Dirty" else engine.digest
    return back


def _activate(spec: WeightRolloutSpec, course: Course, targets: Sequence[Target], failures: Failures) -> list[str]:
    """UIDs of the pods that change now."""
    digest = course.target.digest
    waiting = [t for t in targets if _must_prepare(t, digest, failures)]
    if waiting:
        return []
    candidates = [t for t in targets if _can_change(t, digest, failures)]
    candidates.sort(key=lambda t: (not t.unavailable, t.pod.node, t.pod.name, t.pod.uid))
    room = budget.limit(spec.strategy, len(targets)) - budget.unavailable(targets)
    chosen: list[str] = []
    for target in candidates:
        cost = 0 if target.unavailable else 1
        if cost <= room:
            chosen.append(target.pod.uid)
            room -= cost
    return chosen


def _must_prepare(target: Target, digest: str, failures: Failures) -> bool:
    """Whether nobody may change before this pod has prepared (or refused)."""
    engine = target.engine
    if engine is None or not target.connected or engine.phase in ("Booting", "Committing"):
        return False
    if target.pod.uid in failures.failed or target.serves(digest) or target.prepared(digest):
        return False
    return target.assigned is None or target.assigned.digest != digest


def _can_change(target: Target, digest: str, failures: Failures) -> bool:
    """Whether this pod could change at once."""
    staged = target.state.staged(digest) if target.state else None
    return (
        target.assigned is not None
        and target.assigned.digest != digest
        and target.prepared(digest)
        and staged is not None
        and staged.phase == "Staged"
        and target.pod.uid not in failures.failed
    )


def assignment(target: Target, digest: str, prepare: str, spec: WeightRolloutSpec, version: str) -> PodAssignment:
    """As it goes into the node's spec, with the token that it has."""
    return PodAssignment(
        token=target.assigned.token if target.assigned else 0,
        uid=target.pod.uid,
        name=target.pod.name,
        namespace=target.pod.namespace,
        digest=digest,
        version=version,
        prepare=prepare,
        mode=spec.activation.mode,
        drain_timeout_seconds=spec.activation.drain_timeout_seconds,
        commit_timeout_seconds=spec.activation.commit_timeout_seconds,
    )
