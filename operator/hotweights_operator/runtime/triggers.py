"""Which decisions an event may change. Too many cost a little work, one too few would lose a
wake-up.

What an event wakes does not grow with the cluster: a node wakes the rollouts with pods or entries
on it, a pod the rollouts that select it, a version the rollouts that name it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from hotweights_operator.model.objects import Agent, Node, NodeState, Pod, Rollout, Version
from hotweights_operator.model.observed import Kind, Observed

Key = tuple[Literal["rollout", "version", "node"], str]
"""What is decided about: a rollout or version by namespace/name, a node by name."""


def affected(kind: Kind, old: Any, new: Any, observed: Observed) -> set[Key]:
    """The decisions that may come out differently now that an object is no longer ``old`` (None: it
    is new) but ``new`` (None: gone).
    """
    value = new if new is not None else old
    match value:
        case Rollout():
            return _by_rollout(old, new, observed)
        case Version():
            return _by_version(old, new, observed)
        case Pod():
            return {key for pod in (old, new) if pod is not None for key in _by_pod(pod, observed)}
        case NodeState():
            return _by_state(old, new, observed)
        case Node():
            return _around(value.name, observed)
        case Agent():
            return {
                key
                for agent in (old, new)
                if agent is not None
                for key in _around(agent.node, observed)
            }
        case _:
            raise TypeError(
                f"{kind} has no keys: teach `triggers.affected` about {type(value).__name__}"
            )


def everything(observed: Observed) -> set[Key]:
    """Every rollout and version, and every node that is known by any object."""
    nodes = {*observed.nodes, *observed.states, *(pod.node for pod in observed.pods.values())} - {
        ""
    }
    return {
        *map(rollout_key, observed.rollouts.values()),
        *map(version_key, observed.versions.values()),
        *(("node", name) for name in nodes),
    }


def rollout_key(rollout: Rollout) -> Key:
    return ("rollout", f"{rollout.namespace}/{rollout.name}")


def version_key(version: Version) -> Key:
    return ("version", f"{version.namespace}/{version.name}")


def _by_rollout(old: Rollout | None, new: Rollout | None, observed: Observed) -> set[Key]:
    """Itself; when it comes, goes or begins to go, also whoever may gain or lose pods by that."""
    value = new or old
    if value is None:
        return set()
    # an edit moves no pods: spec.target is immutable (CEL in the custom resource's schema)
    if (
        old is not None
        and new is not None
        and (old.uid, old.terminating) == (new.uid, new.terminating)
    ):
        return {rollout_key(new)}
    found: set[Key] = {
        rollout_key(value),
        *map(rollout_key, observed.owners.rollouts_in(value.namespace)),
    }
    populated = {pod.node for pod in observed.owners.pods_in(value.namespace)} - {""}
    uids = {rollout.uid for rollout in (old, new) if rollout is not None}
    entered = {node for uid in uids for node in observed.entered(uid)}
    return found | {("node", node) for node in populated | entered}


def _by_pod(pod: Pod, observed: Observed) -> set[Key]:
    """The rollouts that select it, and those in whose entries it still stands."""
    state = observed.states.get(pod.node)
    entered = (observed.rollouts.get(uid) for uid in state.entered(pod.uid)) if state else ()
    known = (*observed.owners.selecting(pod), *entered)
    found: set[Key] = {rollout_key(rollout) for rollout in known if rollout is not None}
    return found | ({("node", pod.node)} if pod.node else set())


def _by_version(old: Version | None, new: Version | None, observed: Observed) -> set[Key]:
    found: set[Key] = set()
    for version in (old, new):
        if version is None:
            continue
        found |= {version_key(version), *(("node", name) for name in observed.asked(version.uid))}
        digest = version.status.digest
        for rollout in observed.owners.rollouts_in(version.namespace):
            status = rollout.status
            known = {status.target.digest, status.stable.digest, status.previous.digest}
            if rollout.spec.version_ref.name == version.name or (digest and digest in known):
                found.add(rollout_key(rollout))
    return found


def _by_state(old: NodeState | None, new: NodeState | None, observed: Observed) -> set[Key]:
    state = new or old
    if state is None:
        return set()
    found: set[Key] = {("node", state.name), *_with_pods_or_entries(state.name, observed)}
    if old is not None:
        left = (observed.rollouts.get(entry.uid) for entry in old.spec.rollouts)
        found |= {rollout_key(rollout) for rollout in left if rollout is not None}
    uids = {item.uid for known in (old, new) if known is not None for item in known.spec.resolve}
    found |= {version_key(observed.versions[uid]) for uid in uids if uid in observed.versions}
    spoke = bool(old and old.status.boot_id), bool(new and new.status.boot_id)
    # an agent came or went: versions may have another reader, and those that waited have one
    if spoke[0] != spoke[1]:
        found |= _unresolved(observed)
    if old is not None and new is not None and len(old.spec.resolve) > len(new.spec.resolve):
        found |= _unresolved(observed)  # there is room again
    return found


def _around(node: str, observed: Observed) -> set[Key]:
    """What depends on whether a node and its agent are there."""
    if not node:  # an agent's pod that is not scheduled yet
        return set()
    return {("node", node), *_with_pods_or_entries(node, observed), *_unresolved(observed)}


def _with_pods_or_entries(node: str, observed: Observed) -> set[Key]:
    state = observed.states.get(node)
    owners = (observed.owners.owner(pod.uid) for pod in observed.owners.pods_on(node))
    entered = (observed.rollouts.get(entry.uid) for entry in state.spec.rollouts) if state else ()
    found: Iterable[Rollout | None] = (*owners, *entered)
    return {rollout_key(rollout) for rollout in found if rollout is not None}


def _unresolved(observed: Observed) -> set[Key]:
    return {version_key(version) for version in observed.version_index.unresolved.values()}
