"""An API server in memory: versions of objects, a log per kind for watchers, server-side apply of
entries, and refusals.

It holds the same frozen values that the operator decides on, so that a step costs microseconds.
What it must get right is what the decisions rely on: every write is a new resourceVersion, an apply
with an old one is refused, the spec's generation grows, an apply by one manager replaces that
manager's entry and no other, and what is longer than the schema allows is never taken.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from hotweights_crds.base import Model
from hotweights_crds.nodeweights import (
    MAX_RESOLVE,
    MAX_ROLLOUTS,
    NodeWeightsSpec,
    NodeWeightsStatus,
)
from hotweights_kube.resources import Body
from hotweights_operator.model.actions import Action, AskResolve, Assign, CreateNodeWeights
from hotweights_operator.model.objects import NodeState, Rollout
from hotweights_operator.runtime.cache import KINDS, Kind
from hotweights_operator.sim.cluster.schema import excess
from hotweights_operator.sim.coverage import Counts

LogEntry = tuple[int, str, Any]  # resourceVersion, key, value (None: deleted)


class Refused(Exception):
    """Conflict, or the object is not there."""


class Invalid(Refused):
    """The body will never be taken: it is longer than the schema allows, or an admission webhook
    says no.
    """


class Judge(Protocol):
    """Who looks at every write, once it is done or refused; may raise `Violated`."""

    def refused(self, name: str, why: str) -> None:
        """Somebody wrote what the schema does not allow."""
        ...

    def assigned(self, before: NodeState, action: Assign) -> None:
        """An entry has been written; ``before`` is the object that it went into."""
        ...

    def resolving(self, action: AskResolve) -> None:
        """A node has been asked to read a source."""
        ...

    def told(self, before: Rollout, after: Rollout) -> None:
        """A rollout's status has been written."""
        ...


@dataclass(slots=True)
class Api:
    """All objects, and everything that happened to them."""

    version: int = 0
    objects: dict[Kind, dict[str, tuple[int, Any]]] = field(
        default_factory=lambda: {kind: {} for kind in KINDS}
    )
    log: dict[Kind, list[LogEntry]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    counts: Counts = field(default_factory=Counter)
    refusing: set[str] = field(default_factory=set)  # nodes of whose objects no spec is taken
    lease: Body | None = None  # beside the objects: it says nothing of rollouts
    _lease_version: int = 0
    judge: Judge | None = None

    def put(self, kind: Kind, key: str, value: Any) -> int:
        """Write an object; those that know their resourceVersion get the new one. Raises
        `Invalid`.
        """
        before = self.get(kind, key)
        if kind in ("rollout", "version"):
            self._fits(key, value.status)
        self.version += 1
        if hasattr(value, "resource_version"):
            value = replace(value, resource_version=str(self.version))
        self.objects[kind][key] = (self.version, value)
        self.log[kind].append((self.version, key, value))
        if (
            self.judge is not None
            and isinstance(before, Rollout)
            and before.status is not value.status
        ):
            self.judge.told(before, value)
        return self.version

    def delete(self, kind: Kind, key: str) -> None:
        """Delete an object that may be gone."""
        known = self.objects[kind].pop(key, None)
        if known is not None:
            self.version += 1
            self.log[kind].append((self.version, key, None))

    def get(self, kind: Kind, key: str) -> Any:
        """The object as it is now; None: there is none."""
        found = self.objects[kind].get(key)
        return found[1] if found else None

    def version_of(self, kind: Kind, key: str) -> int:
        """The resourceVersion of an object that is there."""
        return self.objects[kind][key][0]

    def put_lease(self, asked: Body) -> Body:
        """Write the Lease, fenced by its resourceVersion. Raises `Refused`."""
        known = self.lease["metadata"]["resourceVersion"] if self.lease else None
        if asked["metadata"].get("resourceVersion") != known:
            raise Refused("the lease")
        self._lease_version += 1
        metadata = {**asked["metadata"], "resourceVersion": str(self._lease_version)}
        self.lease = {**asked, "metadata": metadata}
        return self.lease

    def perform(self, action: Action) -> str:
        """Do what `perform` would do against a real API server; the name of the NodeWeights. Raises
        `Refused`.
        """
        if action.node in self.refusing:
            self.counts["write is refused as invalid"] += 1
            raise Invalid(f"{action.node}: an admission webhook denied the request")
        match action:
            case CreateNodeWeights():
                if (
                    self.get("node", action.node) is None
                    or self.get("state", action.node) is not None
                ):
                    raise Refused(action.node)
                self.put("state", action.node, NodeState(action.node, generation=1))
            case Assign():
                state = self._fenced(action.node, action.resource_version)
                rest = [entry for entry in state.spec.rollouts if entry.uid != action.uid]
                entries = [*rest, action.entry] if action.entry else rest
                if action.entry is not None:
                    self._fits(action.node, action.entry)
                if len(entries) > MAX_ROLLOUTS:
                    self._refuse(action.node, f"{len(entries)} entries in spec.rollouts")
                self._set_spec(state, state.spec.model_copy(update={"rollouts": entries}))
                if self.judge is not None:
                    self.judge.assigned(state, action)
            case AskResolve():
                state = self._fenced(action.node, action.resource_version)
                others = [item for item in state.spec.resolve if item.uid != action.uid]
                items = [*others, action.item] if action.item else others
                if len(items) > MAX_RESOLVE:
                    self._refuse(action.node, f"{len(items)} entries in spec.resolve")
                self._set_spec(state, state.spec.model_copy(update={"resolve": items}))
                if self.judge is not None:
                    self.judge.resolving(action)
        return action.node

    def set_status(self, node: str, status: NodeWeightsStatus) -> None:
        """What an agent writes; a status of a newer spec than it read cannot be made up."""
        state = self.get("state", node)
        if state is not None and state.status != status:
            self.put("state", node, replace(state, status=status))

    def _fits(self, name: str, value: Model) -> None:
        if why := excess(value):
            self._refuse(name, why)

    def _refuse(self, name: str, why: str) -> None:
        if self.judge is not None:
            self.judge.refused(name, why)
        raise Invalid(f"{name}: {why}")

    def _fenced(self, node: str, resource_version: str) -> NodeState:
        state: NodeState | None = self.get("state", node)
        if state is None or (resource_version and state.resource_version != resource_version):
            raise Refused(node)
        return state

    def _set_spec(self, state: NodeState, spec: NodeWeightsSpec) -> None:
        if spec != state.spec:
            self.put(
                "state", state.name, replace(state, spec=spec, generation=state.generation + 1)
            )
