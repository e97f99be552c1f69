"""Which pods do not follow, and why.

Two kinds, because they mean different things. What *failed* was tried and refused: that speaks against this version in this
revision, by the digest that the engine itself names, and the failure policy counts it. What is *missing* (no engine, no agent, no
node, a write that is refused) says nothing about the version: it is named, and the others go on without it.

What failed once in a revision has failed in it: the engine forgets when it restarts, so the status remembers, as far as it has
room. What failed on a node (staging) is not remembered: its agent goes on trying, and says so when it succeeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hotweights_crds.weightrollout import Failure, WeightRolloutStatus
from hotweights_operator import budget
from hotweights_operator.observed import Refusal
from hotweights_operator.targets import Target

PREPARE_CRASHES = 2
"""So many short runs since a pod was asked to prepare a version speak against the version. One may be chance."""

MISSING_REASONS = frozenset(
    {
        "NotScheduled",
        "NodeNotReady",
        "AgentMissing",
        "EngineNotConnected",
        "WriteRefused",
        "ClockSetBack",
        "TooManyPods",
    }
)
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


def find(
    targets: Sequence[Target], base: WeightRolloutStatus, refused: Mapping[str, Refusal], left_out: Iterable[str] = ()
) -> Failures:
    """What keeps pods from serving the target. Pods that serve it are not looked at.

    ``refused`` are nodes that could not be written to, ``left_out`` UIDs of pods that do not fit into their node's object.
    """
    digest, revision = base.target.digest, base.revision
    known = {f.pod_uid: f for f in base.failures if f.pod_uid and f.reason not in MISSING_REASONS}
    without_room = frozenset(left_out)
    failed: dict[str, Failure] = {}
    missing: dict[str, Failure] = {}
    for target in targets:
        if target.serves(digest):
            continue
        uid = target.pod.uid
        if failure := _failed(target, digest, revision) or known.get(uid):
            failed[uid] = failure
        elif failure := _missing(target, refused.get(target.pod.node), without_room):
            missing[uid] = failure
    return Failures(failed, missing)


def _failed(target: Target, digest: str, revision: int) -> Failure | None:
    if not digest:
        return None
    staged = target.state.staged(digest) if target.state and target.follows else None
    if staged is not None and staged.phase == "Failed":
        return _failure(target, staged.reason or "StagingFailed", staged.message, uid="")
    if target.gave_up(digest, revision) and target.engine is not None and target.engine.failed is not None:
        said = target.engine.failed
        return _failure(target, said.reason or f"{said.step}Failed", said.message)
    return _crashed(target, digest, revision)


def _crashed(target: Target, digest: str, revision: int) -> Failure | None:
    """Whether its container ends again and again since it was told this version, or asked to prepare it."""
    order, ran = target.assigned, target.pod.last_run_seconds or 0.0
    if order is None or order.revision != revision or not target.crashes:
        return None
    if order.digest == digest and target.crashes >= budget.CRASHES:
        text = f"its container ended {target.crashes} times since it was told this version, last after {ran:.0f} s: see its log"
        return _failure(target, "CrashLooping", text)
    if order.prepare == digest and (target.crashes >= PREPARE_CRASHES or target.pod.oom_killed):
        if target.pod.oom_killed:
            text = "the kernel killed its container for its memory while it was asked to prepare this version: raise its memory limit"
            return _failure(target, "OutOfMemory", text)
        text = f"its container ended {target.crashes} times while it was asked to prepare this version: see its log"
        return _failure(target, "CrashedPreparing", text)
    return None


def _missing(target: Target, refused: Refusal | None, without_room: frozenset[str]) -> Failure | None:
    node = target.pod.node
    if not node:
        return _failure(target, "NotScheduled", "the pod has no node yet")
    if refused is not None:
        return _failure(target, "WriteRefused", f"what node {node} is to do cannot be written: {refused.message}")
    if target.pod.uid in without_room:
        return _failure(target, "TooManyPods", f"node {node} has more pods of this rollout than its object holds")
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
    if target.clock_was_set_back():
        return _failure(
            target,
            "ClockSetBack",
            f"the clock of node {node} was set back after the container started, so what its engine confirms cannot be told from"
            " an earlier life: mend the clock, and restart the container unless the clock passes that start soon",
        )
    return None


def _failure(target: Target, reason: str, message: str, uid: str | None = None) -> Failure:
    return Failure(
        pod=target.pod.name,
        pod_uid=target.pod.uid if uid is None else uid,
        node=target.pod.node,
        reason=reason[:64],
        message=(message or reason)[:_MAX_MESSAGE],
    )
