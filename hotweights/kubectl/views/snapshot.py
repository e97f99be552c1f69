"""What was read of a cluster at one moment, as the operator's own values.

The plugin judges nothing by rules of its own: which pods are a rollout's, what a pod serves and who
may change next are asked of the operator's model and decisions. What somebody may not read is
None here, not empty: a view then says that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from hotweights_kube.resources import Body
from hotweights_operator.model.objects import Agent, Node, NodeState, Pod, Rollout, Version
from hotweights_operator.model.observed import Observed
from hotweights_operator.runtime import observe

T = TypeVar("T")
Bodies = Mapping[str, Iterable[Body] | None]
"""Kind (those of `PARSERS`) → its objects as the API server sent them; None: they may not be read."""

PARSERS: dict[str, Callable[[Body], Any]] = {
    "rollout": observe.rollout,
    "version": observe.version,
    "pod": observe.pod,
    "state": observe.node_state,
    "node": observe.node,
    "agent": observe.agent,
}


@dataclass(slots=True)
class Clock:
    """A time that somebody sets."""

    now: datetime

    def __call__(self) -> datetime:
        return self.now


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a view is made of."""

    now: datetime
    rollouts: tuple[Rollout, ...]
    versions: tuple[Version, ...] | None
    pods: tuple[Pod, ...] | None
    states: tuple[NodeState, ...] | None
    nodes: tuple[Node, ...] | None
    agents: tuple[Agent, ...] | None
    malformed: tuple[str, ...] = ()  # objects that do not fit this release: why

    def rollout(self, name: str) -> Rollout | None:
        """The rollout of this name; None: it was not read."""
        return next((rollout for rollout in self.rollouts if rollout.name == name), None)

    def version(self, name: str, namespace: str) -> Version | None:
        """A WeightVersion by its name, else the only one with this version; None: there is none."""
        own = [v for v in self.versions or () if v.namespace == namespace]
        by_version = [v for v in own if v.spec.version == name]
        named = next((v for v in own if v.name == name), None)
        return named or (by_version[0] if len(by_version) == 1 else None)

    def unreadable(self) -> tuple[str, ...]:
        """The kinds that may not be read, in words."""
        words = {
            "versions": "WeightVersions",
            "pods": "pods",
            "states": "NodeWeights",
            "nodes": "nodes",
            "agents": "the agents' pods",
        }
        return tuple(word for field, word in words.items() if getattr(self, field) is None)

    def observed(self, clock: Clock | None = None) -> Observed:
        """The same as the operator sees it. Of what may not be read the best is assumed: nodes are
        Ready and their agents follow. ``clock`` is that by which it goes on.
        """
        clock = clock or Clock(self.now)
        found = Observed(clock=clock)
        names = {pod.node for pod in self.pods or ()} | {state.name for state in self.states or ()}
        nodes, agents = self.nodes, self.agents
        if nodes is None:
            nodes = tuple(Node(name, name) for name in sorted(names - {""}))
        if agents is None:
            agents = tuple(Agent(name, name, ready=True) for name in sorted(names - {""}))
        values: list[tuple[Any, str, Iterable[Any]]] = [
            ("node", "name", nodes),
            ("agent", "uid", agents),
            ("state", "name", self.states or ()),
            ("version", "uid", self.versions or ()),
            ("rollout", "uid", self.rollouts),
        ]
        for kind, key, several in values:
            for value in several:
                found.put(kind, getattr(value, key), value)
        for pod in self.pods or ():
            # as one who has watched it since then: how long it has been so, its object says
            clock.now = min(self.now, pod.ready_since or self.now)
            found.put("pod", pod.uid, pod)
        clock.now = self.now
        return found


def parse(bodies: Bodies, now: datetime) -> Snapshot:
    """What was read, as values; what does not fit this release's schema is left out and named."""
    found: dict[str, tuple[Any, ...] | None] = {}
    malformed: list[str] = []
    for kind, parser in PARSERS.items():
        several = bodies.get(kind)
        if several is None:
            found[kind] = None
            continue
        values = []
        for body in several:
            try:
                values.append(parser(body))
            except observe.Malformed as error:
                malformed.append(str(error))
        found[kind] = tuple(sorted(values, key=_by_name))
    return Snapshot(
        now=now,
        rollouts=found["rollout"] or (),
        versions=found["version"],
        pods=found["pod"],
        states=found["state"],
        nodes=found["node"],
        agents=found["agent"],
        malformed=tuple(malformed),
    )


def _by_name(value: Any) -> tuple[str, str]:
    # an agent has no name of its own here: its node's
    return getattr(value, "namespace", ""), getattr(value, "name", "") or value.node
