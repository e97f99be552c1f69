"""To whom each pod belongs: the oldest rollout of its namespace that selects it, whatever comes
later.

A younger rollout that selects it too is in conflict and holds still: it would be wrong half of the
time to guess what was meant. Kept up to date pod by pod and rollout by rollout; it knows selectors
and ages, and no node's word.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from hotweights_operator.model.objects import Pod, Rollout
from hotweights_operator.model.selectors import selects


class PodOwners:
    """The rollouts and the opted-in pods. ``touched`` hears of every node whose pods may be
    somebody else's now.
    """

    def __init__(self, touched: Callable[[str], object]) -> None:
        self.rollouts: dict[str, Rollout] = {}
        """By UID."""
        self.pods: dict[str, Pod] = {}
        """By UID."""
        self._touched = touched
        # namespace → the oldest first, without those being deleted
        self._rollouts_in: dict[str, list[Rollout]] = {}
        self._pods_on: dict[str, dict[str, Pod]] = {}
        self._pods_in: dict[str, dict[str, Pod]] = {}
        self._owner: dict[str, str] = {}  # pod UID → rollout UID
        self._members: dict[str, set[str]] = {}  # rollout UID → pod UIDs
        # rollout UID → node → its live pods' UIDs, all in order
        self._ordered: dict[str, dict[str, list[str]]] = {}

    def rollouts_in(self, namespace: str) -> list[Rollout]:
        """The namespace's rollouts, the oldest first, without those being deleted."""
        return self._rollouts_in.get(namespace, [])

    def pods_on(self, node: str) -> Collection[Pod]:
        """The opted-in pods of a node; of no node yet, for the empty name."""
        return self._pods_on.get(node, {}).values()

    def pods_in(self, namespace: str) -> Collection[Pod]:
        """The opted-in pods of a namespace."""
        return self._pods_in.get(namespace, {}).values()

    def owner(self, pod_uid: str) -> Rollout | None:
        """The rollout that a pod belongs to; None: none selects it."""
        uid = self._owner.get(pod_uid)
        return self.rollouts.get(uid) if uid else None

    def selecting(self, pod: Pod) -> list[Rollout]:
        """All rollouts that select a pod; the first one owns it."""
        return [
            r
            for r in self.rollouts_in(pod.namespace)
            if selects(r.spec.target.selector, pod.labels)
        ]

    def pods_by_node(self, rollout_uid: str) -> dict[str, list[str]]:
        """Node → UIDs of a rollout's live pods, both in order; the empty name for those that have
        no node yet.
        """
        ordered = self._ordered.get(rollout_uid)
        if ordered is None:
            own = (self.pods[uid] for uid in self._members.get(rollout_uid, ()))
            ordered = self._ordered[rollout_uid] = {}
            for pod in sorted(
                (pod for pod in own if pod.live), key=lambda pod: (pod.node, pod.name, pod.uid)
            ):
                ordered.setdefault(pod.node, []).append(pod.uid)
        return ordered

    def put_rollout(self, value: Rollout) -> None:
        """A rollout is new or different."""
        old = self.rollouts.get(value.uid)
        self.rollouts[value.uid] = value
        same = old is not None and (old.age_key, old.terminating) == (
            value.age_key,
            value.terminating,
        )
        same = same and old is not None and old.spec.target == value.spec.target
        self._list_rollouts(value.namespace, claims=not same)

    def drop_rollout(self, value: Rollout) -> None:
        """A rollout is gone; its pods go to the next one that selects them."""
        self.rollouts.pop(value.uid, None)
        self._list_rollouts(value.namespace, claims=True)

    def put_pod(self, value: Pod) -> None:
        """A pod is new or different."""
        old = self.pods.get(value.uid)
        if old is not None and old.node != value.node:
            self._pods_on[old.node].pop(value.uid, None)
            self._touched(old.node)
        self.pods[value.uid] = value
        self._pods_on.setdefault(value.node, {})[value.uid] = value
        self._pods_in.setdefault(value.namespace, {})[value.uid] = value
        self._touched(value.node)
        moved = old is None or (old.live, old.node, old.name) != (
            value.live,
            value.node,
            value.name,
        )
        if moved or (old is not None and old.labels != value.labels):
            self._claim(value.uid, value, moved=moved)

    def drop_pod(self, value: Pod) -> None:
        """A pod is gone from the API server, not merely being deleted."""
        self.pods.pop(value.uid, None)
        for index, key in ((self._pods_on, value.node), (self._pods_in, value.namespace)):
            index.get(key, {}).pop(value.uid, None)
            if not index.get(key, {"": None}):
                del index[key]
        self._touched(value.node)
        self._claim(value.uid, None, moved=True)

    def _list_rollouts(self, namespace: str, *, claims: bool) -> None:
        """The namespace's rollouts anew, and, if that may have changed, to whom its pods belong."""
        own = (r for r in self.rollouts.values() if r.namespace == namespace and not r.terminating)
        self._rollouts_in[namespace] = sorted(own, key=lambda rollout: rollout.age_key)
        # asking every selector about every pod is for what changes selectors, ages or who is there
        if not claims:
            return
        for pod in self.pods_in(namespace):
            self._claim(pod.uid, pod, moved=False)

    def _claim(self, uid: str, pod: Pod | None, *, moved: bool) -> None:
        """To whom a pod belongs; None: it is gone. ``moved``: it stands at another place among its
        owner's pods.
        """
        before = self._owner.get(uid, "")
        after = next((r.uid for r in self.selecting(pod)), "") if pod else ""
        # most events of a pod change neither
        if before == after and not moved:
            return
        self._owner.pop(uid, None)
        if pod is not None:
            self._touched(pod.node)
        if before:
            self._members[before].discard(uid)
            self._ordered.pop(before, None)
            if not self._members[before]:
                del self._members[before]
        if after:
            self._owner[uid] = after
            self._members.setdefault(after, set()).add(uid)
            self._ordered.pop(after, None)
