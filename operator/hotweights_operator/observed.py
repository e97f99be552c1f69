"""All that is seen at one time, with the ways through it that decisions and wake-ups need.

It is kept up to date object by object (`put`, `drop`), so that what one event costs does not grow with the cluster. It may be older
than the truth; writes are fenced for that reason. Decisions only read it, and run between two events, never during one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from hotweights_operator import shares, targets
from hotweights_operator.model import Agent, Node, NodeState, Pod, Refusal, Rollout, Version
from hotweights_operator.selectors import selects
from hotweights_operator.shares import Question, Share
from hotweights_operator.targets import Seen, Target

Kind = Literal["rollout", "version", "node", "agent", "state", "pod"]
KINDS: tuple[Kind, ...] = ("rollout", "version", "node", "agent", "state", "pod")


def _now() -> datetime:
    return datetime.now(UTC)


class Observed:
    """Rollouts, versions and pods by namespace; nodes, their agents and NodeWeights by the node's name."""

    def __init__(
        self,
        rollouts: Iterable[Rollout] = (),
        versions: Iterable[Version] = (),
        nodes: Mapping[str, Node] | None = None,
        agents: Mapping[str, bool] | None = None,
        states: Mapping[str, NodeState] | None = None,
        pods: Iterable[Pod] = (),
        clock: Callable[[], datetime] = _now,
    ) -> None:
        self._clock = clock
        self.rollouts: dict[str, Rollout] = {}
        """By UID."""
        self.versions: dict[str, Version] = {}
        """By UID."""
        self.nodes: dict[str, Node] = {}
        self.states: dict[str, NodeState] = {}
        self.pods: dict[str, Pod] = {}
        """The opted-in pods, by UID."""
        self.refusals: dict[tuple[str, str], Refusal] = {}
        """(rollout UID, node) → what the API server said last to a write for it."""
        self.peers_epoch = 0
        """Grows whenever another agent might be asked for a version, or can no longer be."""
        self.versions_epoch = 0
        """Grows with every change of a WeightVersion."""
        self.remembered: dict[str, dict[tuple[str, str], Any]] = {}
        """Node → (what, rollout UID) → what decisions found out about it, for as long as nothing on the node changes."""
        self.interned: dict[tuple[str, str], Any] = {}
        """(what, rollout UID) → an equal value of an earlier pass, so that sameness is a matter of identity."""
        self._follows: dict[str, bool] = {}
        self._peers: tuple[int, frozenset[str]] = (-1, frozenset())
        self._agents: dict[str, dict[str, Agent]] = {}  # node → UID → agent
        self._rollouts_in: dict[str, list[Rollout]] = {}  # namespace → the oldest first, without those being deleted
        self._versions_by_name: dict[tuple[str, str], dict[str, Version]] = {}
        self._versions_by_digest: dict[tuple[str, str], dict[str, Version]] = {}
        self.unresolved: dict[str, Version] = {}
        """Versions without a digest, by UID."""
        self._pods_on: dict[str, dict[str, Pod]] = {}
        self._pods_in: dict[str, dict[str, Pod]] = {}
        self._owner: dict[str, str] = {}  # pod UID → rollout UID
        self._members: dict[str, set[str]] = {}  # rollout UID → pod UIDs
        self._ordered: dict[str, dict[str, list[str]]] = {}  # rollout UID → node → its live pods' UIDs, all in order
        self._entered: dict[str, set[str]] = {}  # rollout UID → nodes with an entry of it
        self._asked: dict[str, set[str]] = {}  # version UID → nodes that are asked to read it
        self._targets: dict[str, Target] = {}
        self._seen: dict[str, Seen] = {}
        for rollout in rollouts:
            self.put("rollout", rollout.uid, rollout)
        for version in versions:
            self.put("version", version.uid, version)
        for name, node in (nodes or {}).items():
            self.put("node", name, node)
        for name, ready in (agents or {}).items():
            self.put("agent", name, Agent(name, name, ready))
        for name, state in (states or {}).items():
            self.put("state", name, state)
        for pod in pods:
            self.put("pod", pod.uid, pod)

    # -- what decisions ask --------------------------------------------------------------------------------------------

    def follows(self, node: str) -> bool:
        """Whether the node is Ready and its agent is Ready and has spoken: only then its word counts."""
        found = self._follows.get(node)
        if found is None:
            known, state = self.nodes.get(node), self.states.get(node)
            speaks = known is not None and known.ready and state is not None and bool(state.status.boot_id)
            found = speaks and any(agent.ready for agent in self._agents.get(node, {}).values())
            self._follows[node] = found
        return found

    def has_agent(self, node: str) -> bool:
        """Whether an agent's pod is on the node, Ready or not."""
        return bool(self._agents.get(node))

    def peers(self) -> frozenset[str]:
        """Nodes whose agents are alive and serve others."""
        epoch, found = self._peers
        if epoch != self.peers_epoch:
            found = frozenset(n for n, state in self.states.items() if state.status.endpoint and self.follows(n))
            self._peers = (self.peers_epoch, found)
        return found

    def version(self, namespace: str, name: str) -> Version | None:
        """A WeightVersion by name, unless it is being deleted."""
        found = self._versions_by_name.get((namespace, name), {})
        return next((v for v in found.values() if not v.terminating), None)

    def version_of_digest(self, namespace: str, digest: str) -> Version | None:
        """Any WeightVersion of the namespace with this digest."""
        return next(iter(self._versions_by_digest.get((namespace, digest), {}).values()), None)

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
        """The rollout that a pod belongs to: the oldest one that selects it, whatever comes later."""
        uid = self._owner.get(pod_uid)
        return self.rollouts.get(uid) if uid else None

    def selecting(self, pod: Pod) -> list[Rollout]:
        """All rollouts that select a pod; the first one owns it."""
        return [r for r in self.rollouts_in(pod.namespace) if selects(r.spec.target.selector, pod.labels)]

    @staticmethod
    def selects(rollout: Rollout, pod: Pod) -> bool:
        """Whether a rollout's selector matches a pod of its namespace."""
        return rollout.namespace == pod.namespace and selects(rollout.spec.target.selector, pod.labels)

    def target(self, pod_uid: str) -> Target:
        """A pod with what is known about it."""
        found = self._targets.get(pod_uid)
        if found is None:
            pod = self.pods[pod_uid]
            found = self._targets[pod_uid] = targets.build(
                pod,
                self.nodes.get(pod.node),
                self.states.get(pod.node),
                self._seen[pod_uid],
                follows=self.follows(pod.node),
            )
        return found

    def nodes_of(self, rollout_uid: str) -> Collection[str]:
        """The nodes of a rollout's live pods, in order; the empty name for those that have none yet."""
        return self._pods_by_node(rollout_uid).keys()

    def targets_of(self, rollout_uid: str) -> list[Target]:
        """A rollout's live pods, by node and name."""
        return [self.target(uid) for uids in self._pods_by_node(rollout_uid).values() for uid in uids]

    def targets_on(self, rollout_uid: str, node: str) -> list[Target]:
        """Those of one node, by name."""
        return [self.target(uid) for uid in self._pods_by_node(rollout_uid).get(node, ())]

    def share(self, rollout_uid: str, node: str, question: Question) -> Share:
        """What a rollout's pods on one node are at."""
        refusal = self.refusals.get((rollout_uid, node))
        known = self.remembered.setdefault(node, {})
        found: tuple[Question, Refusal | None, Share] | None = known.get(("share", rollout_uid))
        if found is None or found[0] is not question or found[1] != refusal:
            own = tuple(self.target(uid) for uid in self._pods_by_node(rollout_uid)[node])
            found = (question, refusal, shares.build(rollout_uid, node, own, self.states.get(node), question, refusal))
            known["share", rollout_uid] = found
        return found[2]

    def intern(self, what: str, rollout_uid: str, value: Any) -> Any:
        """The value, or one of an earlier pass that is equal to it."""
        known = self.interned.get((what, rollout_uid))
        if known != value:
            self.interned[what, rollout_uid] = known = value
        return known

    def _pods_by_node(self, rollout_uid: str) -> dict[str, list[str]]:
        ordered = self._ordered.get(rollout_uid)
        if ordered is None:
            own = [self.pods[uid] for uid in self._members.get(rollout_uid, ())]
            ordered = self._ordered[rollout_uid] = {}
            for pod in sorted((pod for pod in own if pod.live), key=lambda pod: (pod.node, pod.name, pod.uid)):
                ordered.setdefault(pod.node, []).append(pod.uid)
        return ordered

    def entered(self, rollout_uid: str) -> Collection[str]:
        """Nodes with an entry of a rollout."""
        return self._entered.get(rollout_uid, ())

    def asked(self, version_uid: str) -> list[str]:
        """Nodes that are asked to read a version's source."""
        return sorted(self._asked.get(version_uid, ()))

    # -- what happens --------------------------------------------------------------------------------------------------

    def put(self, kind: Kind, key: str, value: Any) -> None:
        """An object is new or different."""
        match kind:
            case "rollout":
                self._put_rollout(value)
            case "version":
                self._put_version(value)
            case "node":
                old = self.nodes.get(value.name)
                self.nodes[value.name] = value
                self._touch(value.name, peers=old != value)
            case "agent":
                self._put_agent(key, value)
            case "state":
                self._put_state(value)
            case "pod":
                self._put_pod(value)

    def drop(self, kind: Kind, key: str, value: Any) -> None:
        """An object, known as ``value``, is gone."""
        match kind:
            case "rollout":
                self._drop_rollout(value)
            case "version":
                self._drop_version(value)
            case "node":
                self.nodes.pop(value.name, None)
                self._touch(value.name, peers=True)
            case "agent":
                self._agents.get(value.node, {}).pop(key, None)
                self._touch(value.node, peers=True)
            case "state":
                self.states.pop(value.name, None)
                self._index_state(value.name, value, None)
                self._touch(value.name, peers=True)
            case "pod":
                self._drop_pod(value)

    def _touch(self, node: str, *, peers: bool) -> None:
        """What was put together about the node's pods is put together anew."""
        for uid in self._pods_on.get(node, ()):
            self._targets.pop(uid, None)
        self.remembered.pop(node, None)
        self._follows.pop(node, None)
        if peers:
            self.peers_epoch += 1

    def _put_agent(self, key: str, value: Agent) -> None:
        for node in [node for node, known in self._agents.items() if key in known and node != value.node]:
            del self._agents[node][key]
            self._touch(node, peers=True)
        old = self._agents.setdefault(value.node, {}).get(key)
        self._agents[value.node][key] = value
        self._touch(value.node, peers=old != value)

    def _put_state(self, value: NodeState) -> None:
        old = self.states.get(value.name)
        self.states[value.name] = value
        self._index_state(value.name, old, value)
        self._touch(value.name, peers=old is None or _as_peer(old) != _as_peer(value))

    def _index_state(self, name: str, old: NodeState | None, new: NodeState | None) -> None:
        """Which rollouts and versions stand in it."""
        if old is not None and new is not None and old.spec == new.spec:
            return
        before, after = _uids(old), _uids(new)
        for index, was, now in zip((self._entered, self._asked), before, after, strict=True):
            for uid in was - now:
                index[uid].discard(name)
                if not index[uid]:
                    del index[uid]
            for uid in now - was:
                index.setdefault(uid, set()).add(name)

    def _put_version(self, value: Version) -> None:
        old = self.versions.get(value.uid)
        self.versions_epoch += 1
        if old is not None:
            self._drop_version(old)
        self.versions[value.uid] = value
        self._versions_by_name.setdefault((value.namespace, value.name), {})[value.uid] = value
        if value.status.digest:
            self._versions_by_digest.setdefault((value.namespace, value.status.digest), {})[value.uid] = value
        else:
            self.unresolved[value.uid] = value

    def _drop_version(self, value: Version) -> None:
        self.versions_epoch += 1
        self.versions.pop(value.uid, None)
        self.unresolved.pop(value.uid, None)
        for index, name in (
            (self._versions_by_name, (value.namespace, value.name)),
            (self._versions_by_digest, (value.namespace, value.status.digest)),
        ):
            index.get(name, {}).pop(value.uid, None)
            if not index.get(name, {"": None}):
                del index[name]

    def _put_rollout(self, value: Rollout) -> None:
        old = self.rollouts.get(value.uid)
        self.rollouts[value.uid] = value
        claims = old is None or (old.age_key, old.terminating) != (value.age_key, value.terminating)
        claims = claims or old is None or old.spec.target != value.spec.target
        self._list_rollouts(value.namespace, claims=claims)

    def _drop_rollout(self, value: Rollout) -> None:
        self.rollouts.pop(value.uid, None)
        self._list_rollouts(value.namespace, claims=True)
        for node in [node for uid, node in self.refusals if uid == value.uid]:
            del self.refusals[value.uid, node]
        for what, uid in [known for known in self.interned if known[1] == value.uid]:
            del self.interned[what, uid]

    def _list_rollouts(self, namespace: str, *, claims: bool) -> None:
        """The namespace's rollouts anew, and, if that may have changed, to whom its pods belong."""
        own = (r for r in self.rollouts.values() if r.namespace == namespace and not r.terminating)
        self._rollouts_in[namespace] = sorted(own, key=lambda rollout: rollout.age_key)
        if not claims:
            return
        for pod in self.pods_in(namespace):
            self._claim(pod.uid, pod, moved=False)

    def _claim(self, uid: str, pod: Pod | None, *, moved: bool) -> None:
        """To whom a pod belongs; None: it is gone. ``moved``: it stands at another place among its owner's pods."""
        before = self._owner.get(uid, "")
        after = next((r.uid for r in self.selecting(pod)), "") if pod else ""
        if before == after and not moved:
            return
        self._owner.pop(uid, None)
        if pod is not None:
            self.remembered.pop(pod.node, None)
        if before:
            self._members[before].discard(uid)
            self._ordered.pop(before, None)
        if after:
            self._owner[uid] = after
            self._members.setdefault(after, set()).add(uid)
            self._ordered.pop(after, None)

    def _put_pod(self, value: Pod) -> None:
        old = self.pods.get(value.uid)
        if old is not None and old.node != value.node:
            self._pods_on[old.node].pop(value.uid, None)
            self.remembered.pop(old.node, None)
        self.pods[value.uid] = value
        self.remembered.pop(value.node, None)
        self._pods_on.setdefault(value.node, {})[value.uid] = value
        self._pods_in.setdefault(value.namespace, {})[value.uid] = value
        self._targets.pop(value.uid, None)
        self._seen[value.uid] = self._seen_now(old, value)
        moved = old is None or (old.live, old.node, old.name) != (value.live, value.node, value.name)
        if moved or (old is not None and old.labels != value.labels):
            self._claim(value.uid, value, moved=moved)

    def _seen_now(self, old: Pod | None, new: Pod) -> Seen:
        known, now = self._seen.get(new.uid), self._clock()
        same = old is not None and known is not None and _shown(old) == _shown(new)
        shown_since = known.shown_since if same and known else now
        if new.ready:
            return Seen(shown_since, None)
        since = known.unready_since if known and known.unready_since else now
        return Seen(shown_since, since)

    def _drop_pod(self, value: Pod) -> None:
        self.pods.pop(value.uid, None)
        self.remembered.pop(value.node, None)
        for index, key in ((self._pods_on, value.node), (self._pods_in, value.namespace)):
            index.get(key, {}).pop(value.uid, None)
            if not index.get(key, {"": None}):
                del index[key]
        self._targets.pop(value.uid, None)
        self._seen.pop(value.uid, None)
        self._claim(value.uid, None, moved=True)


def _uids(state: NodeState | None) -> tuple[set[str], set[str]]:
    """Rollouts with an entry, versions to be read."""
    if state is None:
        return set(), set()
    return {entry.uid for entry in state.spec.rollouts}, {item.uid for item in state.spec.resolve}


def _shown(pod: Pod) -> tuple[bool, bool, str, int]:
    return (pod.ready, pod.gate, pod.digest_label, pod.restarts)


def _as_peer(state: NodeState) -> tuple[object, ...]:
    """What others must know of a node to pull from it, and whether it has anything to give."""
    status = state.status
    held = tuple(version.digest for version in status.staged if version.phase == "Staged")
    return (status.boot_id, status.endpoint, tuple(status.endpoints), held)
