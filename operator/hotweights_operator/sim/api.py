"""An API server in memory: versions of objects, a log per kind for watchers, server-side apply of entries, and conflicts.

It holds the same frozen values that the operator decides on, so that a step costs microseconds. What it must get right is what
the decisions rely on: every write is a new resourceVersion, an apply with an old one is refused, the spec's generation grows, and
an apply by one manager replaces that manager's entry and no other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from hotweights_crds.nodeweights import NodeWeightsSpec, NodeWeightsStatus
from hotweights_operator.actions import Action, AskResolve, Assign, CreateNodeWeights
from hotweights_operator.cache import KINDS, Kind
from hotweights_operator.model import NodeState

LogEntry = tuple[int, str, Any]  # resourceVersion, key, value (None: deleted)


class Refused(Exception):
    """Conflict, or the object is not there."""


@dataclass(slots=True)
class Api:
    """All objects, and everything that happened to them."""

    version: int = 0
    objects: dict[Kind, dict[str, tuple[int, Any]]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    log: dict[Kind, list[LogEntry]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def put(self, kind: Kind, key: str, value: Any) -> int:
        """Write an object; those that know their resourceVersion get the new one."""
        self.version += 1
        if hasattr(value, "resource_version"):
            value = replace(value, resource_version=str(self.version))
        self.objects[kind][key] = (self.version, value)
        self.log[kind].append((self.version, key, value))
        return self.version

    def delete(self, kind: Kind, key: str) -> None:
        """Delete an object that may be gone."""
        known = self.objects[kind].pop(key, None)
        if known is not None:
            self.version += 1
            self.log[kind].append((self.version, key, None))

    def get(self, kind: Kind, key: str) -> Any:
        """The object, or None."""
        found = self.objects[kind].get(key)
        return found[1] if found else None

    def version_of(self, kind: Kind, key: str) -> int:
        """Its resourceVersion."""
        return self.objects[kind][key][0]

    def perform(self, action: Action) -> str:
        """Do what `perform` would do against a real API server; the name of the NodeWeights."""
        match action:
            case CreateNodeWeights():
                if self.get("node", action.node) is None or self.get("state", action.node) is not None:
                    raise Refused(action.node)
                self.put("state", action.node, NodeState(action.node, generation=1))
            case Assign():
                state = self._fenced(action.node, action.resource_version)
                rest = [entry for entry in state.spec.rollouts if entry.uid != action.uid]
                entries = [*rest, action.entry] if action.entry else rest
                self._set_spec(state, state.spec.model_copy(update={"rollouts": entries}))
            case AskResolve():
                state = self._fenced(action.node, action.resource_version)
                others = [item for item in state.spec.resolve if item.uid != action.uid]
                items = [*others, action.item] if action.item else others
                self._set_spec(state, state.spec.model_copy(update={"resolve": items}))
        return action.node

    def set_status(self, node: str, status: NodeWeightsStatus) -> None:
        """What an agent writes; a status of a newer spec than it read cannot be made up."""
        state = self.get("state", node)
        if state is not None and state.status != status:
            self.put("state", node, replace(state, status=status))

    def _fenced(self, node: str, resource_version: str) -> NodeState:
        state: NodeState | None = self.get("state", node)
        if state is None or (resource_version and state.resource_version != resource_version):
            raise Refused(node)
        return state

    def _set_spec(self, state: NodeState, spec: NodeWeightsSpec) -> None:
        if spec != state.spec:
            self.put("state", state.name, replace(state, spec=spec, generation=state.generation + 1))
