"""Which decisions an event may change. Too many cost a little work, one too few would lose a wake-up; so these are generous."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from hotweights_operator.cache import Agent, Kind
from hotweights_operator.model import Node, NodeState, Observed, Pod, Rollout, Version

Key = tuple[Literal["rollout", "version", "node"], str]
"""What is decided about: a rollout or version by namespace/name, a node by name."""


def affected(kind: Kind, value: Any, observed: Observed) -> set[Key]:
    """The decisions that may come out differently now that this object has come, changed or gone."""
    match value:
        case Rollout():
            return {rollout_key(value), *_rollouts(value.namespace, observed), *_rollout_nodes(value, observed)}
        case Version():
            nodes: set[Key] = {
                ("node", name)
                for name, state in observed.states.items()
                if any(item.uid == value.uid for item in state.spec.resolve)
            }
            return {version_key(value), *_rollouts(value.namespace, observed), *nodes}
        case Pod():
            return {("node", value.node), *_rollouts(value.namespace, observed)}
        case Node() | NodeState():
            return _around(value.name, observed)
        case Agent():
            return _around(value.node, observed)
        case _:
            raise TypeError(f"{kind} has no keys: teach keys.affected about {type(value).__name__}")


def everything(observed: Observed) -> set[Key]:
    """All decisions there are."""
    nodes = {*observed.nodes, *observed.states, *observed.pods_by_node} - {""}
    return {
        *map(rollout_key, observed.rollouts),
        *map(version_key, observed.versions),
        *(("node", name) for name in nodes),
    }


def rollout_key(rollout: Rollout) -> Key:
    """Its key."""
    return ("rollout", f"{rollout.namespace}/{rollout.name}")


def version_key(version: Version) -> Key:
    """Its key."""
    return ("version", f"{version.namespace}/{version.name}")


def _rollouts(namespace: str, observed: Observed) -> Iterable[Key]:
    return (rollout_key(rollout) for rollout in observed.rollouts if rollout.namespace == namespace)


def _rollout_nodes(rollout: Rollout, observed: Observed) -> set[Key]:
    entered = {
        name for name, state in observed.states.items() if any(e.uid == rollout.uid for e in state.spec.rollouts)
    }
    populated = {pod.node for pod in observed.pods if pod.namespace == rollout.namespace}
    return {("node", name) for name in entered | populated if name}


def _around(node: str, observed: Observed) -> set[Key]:
    """What depends on one node: itself, the rollouts with pods or entries there, and versions that wait for a reader."""
    state = observed.states.get(node)
    namespaces = {pod.namespace for pod in observed.pods_by_node.get(node, ())}
    uids = {entry.uid for entry in state.spec.rollouts} if state else set()
    found: set[Key] = {("node", node)}
    found |= {rollout_key(r) for r in observed.rollouts if r.namespace in namespaces or r.uid in uids}
    found |= {version_key(v) for v in observed.versions if not v.status.digest}
    if state is not None:
        asked = {item.uid for item in state.spec.resolve}
        found |= {version_key(v) for v in observed.versions if v.uid in asked}
    return found
