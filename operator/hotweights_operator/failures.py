"""Which pods do not follow, and why.

Two kinds, because they mean different things. What *failed* was tried and refused: that speaks against the version, and the
failure policy counts it. What is *missing* (no engine, no agent, no node) says nothing about the version: it is named, and the
others go on without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hotweights_crds.weightrollout import Failure
from hotweights_operator.targets import Target

FAILED_PHASES = frozenset({"Refused", "Failed", "Dirty"})
_MAX_MESSAGE = 512


@dataclass(frozen=True, slots=True)
class Failures:
    """The pods that do not follow, by UID, in the order of the targets."""

    failed: dict[str, Failure]
    missing: dict[str, Failure]

    @property
    def all(self) -> list[Failure]:
        """Those that failed first."""
        return [*self.failed.values(), *self.missing.values()]


def find(targets: Sequence[Target], digest: str) -> Failures:
    """What keeps pods from serving this digest. Pods that serve it are not looked at."""
    failed: dict[str, Failure] = {}
    missing: dict[str, Failure] = {}
    for target in targets:
        if target.serves(digest):
            continue
        if failure := _failed(target, digest):
            failed[target.pod.uid] = failure
        elif failure := _missing(target):
            missing[target.pod.uid] = failure
    return Failures(failed, missing)


def _failed(target: Target, digest: str) -> Failure | None:
    staged = target.state.staged(digest) if target.state and target.follows else None
    if staged is not None and staged.phase == "Failed":
        return _failure(target, staged.reason or "StagingFailed", staged.message)
    engine, assigned = target.engine, target.assigned
    if engine is None or assigned is None or engine.phase not in FAILED_PHASES or not target.answered:
        return None  # an agent that has not read the spec yet may still speak of the version before
    if digest not in (assigned.digest, assigned.prepare):
        return None
    return _failure(target, engine.reason or f"Engine{engine.phase}", engine.message)


def _missing(target: Target) -> Failure | None:
    node = target.pod.node
    if not node:
        return _failure(target, "NotScheduled", "the pod has no node yet")
    if target.node is None or not target.node.ready:
        return _failure(target, "NodeNotReady", f"node {node} is not Ready or gone; its pods are not touched")
    if not target.follows:
        return _failure(target, "AgentMissing", f"no ready agent on node {node}: see its pod in the agents' DaemonSet")
    if not target.connected:
        return _failure(
            target,
            "EngineNotConnected",
            "its engine is not connected to the node's agent: it still starts, or it runs without the plugin"
            " (a pod takes the plugin when it is created with hotweights.dev/inject=true)",
        )
    return None


def _failure(target: Target, reason: str, message: str) -> Failure:
    return Failure(
        pod=target.pod.name, node=target.pod.node, reason=reason[:64], message=(message or reason)[:_MAX_MESSAGE]
    )
