"""The indices: kept object by object, they say what a look at everything would say; and what an
event wakes is enough.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hotweights_operator.decide.rollouts import decide
from hotweights_operator.model.objects import Agent, Node, NodeState, Pod, Rollout, Version
from hotweights_operator.model.observed import KINDS, Observed
from hotweights_operator.runtime import triggers
from hotweights_operator.runtime.cache import Cache
from tests.operator.worlds import AT_NEW, NEW, NOW, OLD, engine, order, pod, rollout, state, version

pytestmark = pytest.mark.timeout(180)  # thousands of decisions

NAMES = st.sampled_from(("a", "b"))
NODES = st.sampled_from(("n0", "n1", "n2"))
NUMBERS = st.integers(0, 4)


class Cluster(RuleBasedStateMachine):
    """Objects come, change and go; a cache follows, as the operator's does."""

    def __init__(self) -> None:
        super().__init__()
        self.now = datetime(2026, 1, 1, 11, tzinfo=UTC)
        self.cache = Cache(clock=lambda: self.now)
        self.version = 0
        self.woken: set[triggers.Key] = triggers.everything(self.cache.observed())
        self.decided: dict[str, object] = {}

    def put(self, kind: str, key: str, value: object) -> None:
        self.version += 1
        old = self.cache.get(kind, key)  # type: ignore[arg-type]
        if self.cache.put(kind, key, self.version, value):  # type: ignore[arg-type]
            self.woken |= triggers.affected(kind, old, value, self.cache.observed())  # type: ignore[arg-type]

    def drop(self, kind: str, key: str) -> None:
        self.version += 1
        old = self.cache.get(kind, key)  # type: ignore[arg-type]
        if self.cache.drop(kind, key, self.version):  # type: ignore[arg-type]
            self.woken |= triggers.affected(kind, old, None, self.cache.observed())  # type: ignore[arg-type]

    @rule(
        number=NUMBERS,
        node=st.sampled_from(("", "n0", "n1")),
        ready=st.booleans(),
        app=NAMES,
        gone=st.booleans(),
    )
    def a_pod(self, number: int, node: str, ready: bool, app: str, gone: bool) -> None:
        known = pod(number, node, ready=ready, terminating=gone)
        self.put("pod", known.uid, replace(known, labels={**known.labels, "app": app}))

    @rule(number=NUMBERS)
    def no_pod(self, number: int) -> None:
        self.drop("pod", f"p{number}")

    @rule(node=NODES, ready=st.booleans(), agent=st.booleans())
    def a_node(self, node: str, ready: bool, agent: bool) -> None:
        self.put("node", node, Node(node, f"uid-{node}", ready))
        self.put("agent", f"agent-{node}", Agent(f"agent-{node}", node, agent))

    @rule(node=NODES)
    def no_node(self, node: str) -> None:
        self.drop("node", node)
        self.drop("agent", f"agent-{node}")
        self.drop("state", node)

    @rule(
        node=NODES,
        numbers=st.sets(NUMBERS),
        entry=st.sampled_from(("r-a", "r-b", "unassigned")),
        new=st.booleans(),
    )
    def a_state(self, node: str, numbers: set[int], entry: str, new: bool) -> None:
        engines = [engine(n, NEW if new else OLD, prepared=NEW) for n in numbers]
        told = {f"p{n}": order(f"p{n}", OLD) for n in numbers}
        self.put(
            "state",
            node,
            replace(state(node, engines, told, entry), resource_version=str(self.version)),
        )

    @rule(name=NAMES, app=NAMES, age=st.integers(1, 3), terminating=st.booleans())
    def a_rollout(self, name: str, app: str, age: int, terminating: bool) -> None:
        known: Rollout | None = self.cache.get("rollout", f"models/{name}")
        made = rollout(AT_NEW, target={"selector": {"matchLabels": {"app": app}}})
        made = replace(
            made, uid=f"r-{name}", name=name, created_at=str(age), terminating=terminating
        )
        if known is not None:  # its selector and its age never change
            made = replace(made, spec=known.spec, created_at=known.created_at)
        self.put("rollout", f"models/{name}", made)

    @rule(name=NAMES)
    def no_rollout(self, name: str) -> None:
        self.drop("rollout", f"models/{name}")

    @rule(name=st.sampled_from(("old", "new")), resolved=st.booleans())
    def a_version(self, name: str, resolved: bool) -> None:
        self.put(
            "version",
            f"models/{name}",
            version(name, {"old": OLD, "new": NEW}[name] if resolved else ""),
        )

    @rule(name=st.sampled_from(("old", "new")))
    def no_version(self, name: str) -> None:
        self.drop("version", f"models/{name}")

    @rule()
    def time_passes(self) -> None:
        self.now += timedelta(seconds=7)

    def anew(self) -> Observed:
        """The same objects, indexed from nothing."""
        made = Observed(clock=lambda: self.now)
        made._seen = dict(self.cache.observed()._seen)
        for kind in KINDS:
            for value in self.cache.values(kind):
                made.put(kind, getattr(value, "uid", "") if kind == "agent" else "", value)
        made._seen = dict(self.cache.observed()._seen)
        return made

    @invariant()
    def decisions_are_those_of_a_look_at_everything(self) -> None:
        seen, anew = self.cache.observed(), self.anew()
        for known in self.cache.values("rollout"):
            mine, theirs = decide(known, seen, NOW), decide(known, anew, NOW)
            assert mine == theirs
            # Whoever would decide otherwise than before has been woken.
            key = triggers.rollout_key(known)
            before = self.decided.get(known.uid)
            assert key in self.woken or before is None or before == (mine.actions, mine.status)
            self.decided[known.uid] = (mine.actions, mine.status)
        self.woken = set()
        for name in ("n0", "n1", "n2"):
            assert seen.follows(name) == anew.follows(name)
        assert seen.peers() == anew.peers()
        pods: list[Pod] = self.cache.values("pod")
        for each in pods:
            assert seen.owners.owner(each.uid) == anew.owners.owner(each.uid)
            assert seen.target(each.uid) == anew.target(each.uid)
        states: list[NodeState] = self.cache.values("state")
        assert {s.name for s in states} == set(seen.states)
        unresolved: list[Version] = [v for v in self.cache.values("version") if not v.status.digest]
        assert {v.uid for v in unresolved} == set(seen.version_index.unresolved)


TestCluster = Cluster.TestCase
