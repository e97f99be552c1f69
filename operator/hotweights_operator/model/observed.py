"""All that is seen at one time, with the ways through it that decisions and wake-ups need.

It is kept up to date object by object (`put`, `drop`), so that what one event costs does not grow
with the cluster; and what decisions found out about a node's pods is remembered until something on
that node changes. It may be older than the truth; writes are fenced for that reason. Decisions only
read it, and run between two events, never during one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal

from hotweights_common import hosts
from hotweights_operator.model import node_totals, pod_history, targets
from hotweights_operator.model.node_totals import NodeTotals, TotalsQuery
from hotweights_operator.model.objects import Agent, Node, NodeState, Pod, Refusal, Rollout, Version
from hotweights_operator.model.pod_history import PodHistory
from hotweights_operator.model.pod_owners import PodOwners
from hotweights_operator.model.targets import Target
from hotweights_operator.model.version_index import VersionIndex

Kind = Literal["rollout", "version", "node", "agent", "state", "pod"]
KINDS: tuple[Kind, ...] = ("rollout", "version", "node", "agent", "state", "pod")


def _now() -> datetime:
    return datetime.now(UTC)


class Observed:
    """Rollouts, versions and pods by namespace; nodes, their agents and NodeWeights by the node's
    name.
    """

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
        self.nodes: dict[str, Node] = {}
        self.states: dict[str, NodeState] = {}
        self.owners = PodOwners(self._forget)
        self.version_index = VersionIndex()
        self.refusals: dict[tuple[str, str], Refusal] = {}
        """(UID of a rollout or version, node) → what the API server said last to a write for it."""
        self.peers_epoch = 0
        """Grows whenever another agent might be asked for a version, or can no longer be."""
        self.remembered: dict[str, dict[tuple[str, str], Any]] = {}
        """Node → (what, rollout UID) → what decisions found out about it, for as long as nothing on
        the node changes.
        """
        self.interned: dict[tuple[str, str], Any] = {}
        """(what, rollout UID) → an equal value of an earlier pass, so that sameness is a matter of
        identity.
        """
        self._follows: dict[str, bool] = {}
        self._peers: tuple[int, frozenset[str]] = (-1, frozenset())
        self._agents: dict[str, dict[str, Agent]] = {}  # node → UID → agent
        self._entered: dict[str, set[str]] = {}  # rollout UID → nodes with an entry of it
        self._asked: dict[str, set[str]] = {}  # version UID → nodes that are asked to read it
        self._targets: dict[str, Target] = {}
        self._seen: dict[str, PodHistory] = {}
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

    # -- what decisions ask ---------------------------------------------------------------------

    @property
    def rollouts(self) -> Mapping[str, Rollout]:
        """By UID, those being deleted included."""
        return self.owners.rollouts

    @property
    def pods(self) -> Mapping[str, Pod]:
        """By UID: those with the inject label, whether a rollout selects them or not."""
        return self.owners.pods

    @property
    def versions(self) -> Mapping[str, Version]:
        """By UID, those being deleted included."""
        return self.version_index.by_uid

    def follows(self, node: str) -> bool:
        """Whether the node is Ready and its agent is Ready and has spoken: only then its word
        counts.
        """
        found = self._follows.get(node)
        if found is None:
            known, state = self.nodes.get(node), self.states.get(node)
            speaks = (
                known is not None
                and known.ready
                and state is not None
                and bool(state.status.boot_id)
            )
            found = speaks and any(agent.ready for agent in self._agents.get(node, {}).values())
            self._follows[node] = found
        return found

    def has_agent(self, node: str) -> bool:
        """Whether an agent's pod is on the node, Ready or not."""
        return bool(self._agents.get(node))

    def peers(self) -> frozenset[str]:
        """Nodes whose agents are alive and serve others: at an address of their own, because whoever
        pulls there sends a token that opens every version.
        """
        epoch, found = self._peers
        if epoch != self.peers_epoch:
            found = frozenset(
                n
                for n, state in self.states.items()
                if state.status.endpoint and self.follows(n) and self._is_at_home(state)
            )
            self._peers = (self.peers_epoch, found)
        return found

    def _is_at_home(self, state: NodeState) -> bool:
        """Whether all endpoints that a node's agent tells of are addresses of its pod."""
        told = {state.status.endpoint, *(one.endpoint for one in state.status.endpoints)} - {""}
        own = {
            hosts.same(address)
            for agent in self._agents.get(state.name, {}).values()
            if agent.ready
            for address in agent.addresses
        }
        return not own or {hosts.of_endpoint(endpoint) for endpoint in told} <= own

    def entered(self, rollout_uid: str) -> Collection[str]:
        """Nodes with an entry of a rollout."""
        return self._entered.get(rollout_uid, ())

    def asked(self, version_uid: str) -> list[str]:
        """Nodes that are asked to read a version's source."""
        return sorted(self._asked.get(version_uid, ()))

    def target(self, pod_uid: str) -> Target:
        """A pod with what is known about it. Raises `KeyError` for one that is not known."""
        found = self._targets.get(pod_uid)
        if found is None:
            pod = self.pods[pod_uid]
            node, state = self.nodes.get(pod.node), self.states.get(pod.node)
            found = targets.build(
                pod, node, state, self._seen[pod_uid], follows=self.follows(pod.node)
            )
            self._targets[pod_uid] = found
        return found

    def nodes_of(self, rollout_uid: str) -> Collection[str]:
        """The nodes of a rollout's live pods, in order; the empty name for those that have none
        yet.
        """
        return self.owners.pods_by_node(rollout_uid).keys()

    def targets_on(self, rollout_uid: str, node: str) -> list[Target]:
        """A rollout's live pods on a node, by name."""
        return [self.target(uid) for uid in self.owners.pods_by_node(rollout_uid).get(node, ())]

    def node_totals(self, rollout_uid: str, node: str, query: TotalsQuery) -> NodeTotals:
        """What a rollout's pods on one node are at."""
        refusal = self.refusals.get((rollout_uid, node))
        known = self.remembered.setdefault(node, {})
        found: tuple[TotalsQuery, Refusal | None, NodeTotals] | None = known.get(
            ("totals", rollout_uid)
        )
        # by identity: queries are interned, and comparing is done for every node in every pass
        if found is None or found[0] is not query or found[1] != refusal:
            own = tuple(self.targets_on(rollout_uid, node))
            found = (
                query,
                refusal,
                node_totals.build(rollout_uid, node, own, self.states.get(node), query, refusal),
            )
            known["totals", rollout_uid] = found
        return found[2]

    def intern(self, what: str, rollout_uid: str, value: Any) -> Any:
        """The value, or one of an earlier pass that is equal to it."""
        known = self.interned.get((what, rollout_uid))
        if known != value:
            self.interned[what, rollout_uid] = known = value
        return known

    # -- what happens ---------------------------------------------------------------------------

    def put(self, kind: Kind, key: str, value: Any) -> None:
        """An object is new or different."""
        match kind:
            case "rollout":
                self.owners.put_rollout(value)
            case "version":
                self.version_index.put(value)
            case "node":
                old = self.nodes.get(value.name)
                self.nodes[value.name] = value
                self._touch(value.name, peers=old != value)
            case "agent":
                self._put_agent(key, value)
            case "state":
                self._put_state(value)
            case "pod":
                # before the pod is replaced: its history needs how it was
                seen, state = self._seen.get(value.uid), self.states.get(value.node)
                self._seen[value.uid] = pod_history.after(
                    seen, self.pods.get(value.uid), value, state, self._clock()
                )
                self._targets.pop(value.uid, None)
                self.owners.put_pod(value)

    def drop(self, kind: Kind, key: str, value: Any) -> None:
        """An object, known as ``value``, is gone."""
        match kind:
            case "rollout":
                self._drop_rollout(value)
            case "version":
                self.version_index.drop(value)
                self._drop_refusals(value.uid)
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
                self._targets.pop(value.uid, None)
                self._seen.pop(value.uid, None)
                self.owners.drop_pod(value)

    def _forget(self, node: str) -> None:
        """What decisions found out about a node may be so no more."""
        self.remembered.pop(node, None)

    def _touch(self, node: str, *, peers: bool) -> None:
        """What was put together about the node's pods is put together anew."""
        for pod in self.owners.pods_on(node):
            self._targets.pop(pod.uid, None)
        self._forget(node)
        self._follows.pop(node, None)
        if peers:
            self.peers_epoch += 1

    def _put_agent(self, key: str, value: Agent) -> None:
        # a pod never moves, but its node is empty until it is scheduled
        for node in [
            node for node, known in self._agents.items() if key in known and node != value.node
        ]:
            del self._agents[node][key]
            self._touch(node, peers=True)
        old = self._agents.setdefault(value.node, {}).get(key)
        self._agents[value.node][key] = value
        self._touch(value.node, peers=old != value)

    def _put_state(self, value: NodeState) -> None:
        old = self.states.get(value.name)
        self.states[value.name] = value
        for pod in self.owners.pods_on(value.name):
            seen = self._seen[pod.uid]
            if not seen.heard and pod_history.is_connected(value.engine(pod.uid)):
                self._seen[pod.uid] = replace(seen, heard=True)
        self._index_state(value.name, old, value)
        self._touch(value.name, peers=old is None or _as_peer(old) != _as_peer(value))

    def _index_state(self, name: str, old: NodeState | None, new: NodeState | None) -> None:
        """Which rollouts and versions stand in it."""
        # mostly only the status changes, and the index is of the spec
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

    def _drop_rollout(self, value: Rollout) -> None:
        self.owners.drop_rollout(value)
        self._drop_refusals(value.uid)
        for what, uid in [known for known in self.interned if known[1] == value.uid]:
            del self.interned[what, uid]

    def _drop_refusals(self, owner: str) -> None:
        for node in [node for uid, node in self.refusals if uid == owner]:
            del self.refusals[owner, node]


def _uids(state: NodeState | None) -> tuple[set[str], set[str]]:
    """Rollouts with an entry, versions to be read."""
    if state is None:
        return set(), set()
    return {entry.uid for entry in state.spec.rollouts}, {item.uid for item in state.spec.resolve}


def _as_peer(state: NodeState) -> tuple[object, ...]:
    """What others must know of a node to pull from it, and whether it has anything to give."""
    status = state.status
    held = tuple(version.digest for version in status.staged if version.phase == "Staged")
    return (status.boot_id, status.endpoint, tuple(status.endpoints), status.peer_key, held)
