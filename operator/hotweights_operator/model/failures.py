"""Which pods do not follow, and why.

Two kinds, because they mean different things. What *failed* was tried and refused: that speaks
against this version in this revision, by the digest that the engine itself names, and the failure
policy counts it. What is *missing* (no engine, no agent, no node, a write that is refused) says
nothing about the version: it is named, and the others go on without it.

What failed once in a revision has failed in it: the engine forgets when it restarts, so the status
remembers, as far as it has room. What failed on a node (staging) is not remembered: its agent goes
on trying, and says so when it succeeds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hotweights_common.reasons import POD_IS_AWAY, Reason
from hotweights_crds.nodeweights import MAX_PODS
from hotweights_crds.weightrollout import Failure
from hotweights_operator.model.objects import STILL_SERVING_PHASES, Refusal
from hotweights_operator.model.targets import Target

CRASHES = 3
"""So many short runs since a pod was told a version speak against the version: it is in a loop."""

PREPARE_CRASHES = 2
"""So many short runs while a pod was asked to prepare a version speak against the version. One may
be chance, or have been before: the order was written before that end was seen. After it the pod is
left alone until it is calm, so that one that ends by itself does so unasked the next time.
"""


_MAX_MESSAGE = 512  # what the schema takes (`Failure.message`)


@dataclass(frozen=True, slots=True)
class Failures:
    """The pods that do not follow, by UID."""

    failed: Mapping[str, Failure]
    missing: Mapping[str, Failure]

    @property
    def all(self) -> list[Failure]:
        """What failed goes first: the status has room for some only, and these say why."""
        return [*self.failed.values(), *self.missing.values()]


def remembered(failures: Iterable[Failure]) -> dict[str, Failure]:
    """By pod UID: of those that the status names, the ones that go on to hold in this revision. A
    failure of staging has no UID and is not among them.
    """
    return {f.pod_uid: f for f in failures if f.pod_uid and f.reason not in POD_IS_AWAY}


def without_room(rollout_uid: str, targets: Sequence[Target]) -> Collection[str]:
    """UIDs of one node's pods that the rollout's entry there has no room for; those that stand in
    it keep their place.
    """
    # nearly always: kubelets take far fewer pods
    if len(targets) <= MAX_PODS:
        return ()
    entry = targets[0].state.entry(rollout_uid) if targets[0].state else None
    listed = {pod.uid for pod in entry.pods} if entry else set()
    # stable: among those that stand in it, and among the others, the order is that of names
    ordered = sorted(targets, key=lambda target: target.pod.uid not in listed)
    return {target.pod.uid for target in ordered[MAX_PODS:]}


def of_version(
    target: Target, digest: str, rollout_uid: str, revision: int, *, is_back: bool
) -> Failure | None:
    """What speaks against this version on a pod that does not serve it, in this revision.
    ``is_back``: it served everywhere before, so what ends while it prepares that ends of what it
    serves. None: nothing does.
    """
    if not digest:  # there is no version yet
        return None
    staged = target.state.staged(digest) if target.state and target.follows else None
    # without a UID: it is the node's, whose agent goes on trying, so it is not remembered
    if staged is not None and staged.phase == "Failed":
        return _failure(target, staged.reason or "StagingFailed", staged.message, uid="")
    # the engine's own word goes before what is concluded from restarts
    said = target.failed
    if said is not None and target.gave_up(digest, rollout_uid, revision):
        return _failure(target, said.reason or f"{said.step}Failed", said.message)
    # ends under an order of another revision speak against what that said
    if not target.was_told_in(rollout_uid, revision):
        return None
    return _crashed(target, digest, 0 if is_back else ends_preparing(target, rollout_uid, revision))


def ends_preparing(target: Target, rollout_uid: str, revision: int) -> int:
    """How often a pod's container ended in this revision while it was asked to prepare."""
    order = target.assigned
    if order is None or not target.was_told_in(rollout_uid, revision):
        return 0
    return order.ended_preparing + (target.crashes if order.prepare else 0)


def _crashed(target: Target, digest: str, ended_preparing: int) -> Failure | None:
    """Whether its container ends again and again since it was told this version, or while it is
    asked to prepare it.
    """
    ran = target.pod.last_run_seconds or 0.0
    if target.told == digest and target.crashes >= CRASHES:
        text = (
            f"its container ended {target.crashes} times since it was told this version, last "
            f"after {ran:.0f} s: see its log"
        )
        return _failure(target, Reason.CRASH_LOOPING, text)
    if ended_preparing >= PREPARE_CRASHES:
        if target.pod.oom_killed:
            text = (
                "the kernel killed its container for its memory while it was asked to prepare "
                "this version: raise its memory limit"
            )
            return _failure(target, Reason.OUT_OF_MEMORY, text)
        text = (
            f"its container ended {ended_preparing} times while it was asked to prepare this "
            "version: see its log"
        )
        return _failure(target, Reason.CRASHED_PREPARING, text)
    return None


def of_circumstance(target: Target, refused: Refusal | None, *, has_room: bool) -> Failure | None:
    """What keeps a pod back that says nothing about the version; None: nothing does. The order is
    from outside inwards: without its node, nothing can be known of its agent, and so on.
    """
    node = target.pod.node
    if not node:
        return _failure(target, Reason.NOT_SCHEDULED, "the pod has no node yet")
    if refused is not None:
        return _failure(
            target,
            Reason.WRITE_REFUSED,
            f"what node {node} is to do cannot be written: {refused.message}",
        )
    if not has_room:
        return _failure(
            target,
            Reason.TOO_MANY_PODS,
            f"node {node} has more pods of this rollout than its object holds",
        )
    if target.node is None or not target.node.ready:
        return _failure(
            target,
            Reason.NODE_NOT_READY,
            f"node {node} is not Ready or gone; its pods are not touched",
        )
    if not target.follows:
        return _failure(
            target,
            Reason.AGENT_MISSING,
            f"no ready agent on node {node}: see its pod in the agents' DaemonSet",
        )
    if not target.connected:
        return _failure(
            target,
            Reason.ENGINE_NOT_CONNECTED,
            "its engine is not connected to the node's agent: it still starts, or it runs "
            "without the plugin"
            " (a pod takes the plugin when it is created with hotweights.dev/inject=true)",
        )
    if target.clock_was_set_back():
        return _failure(
            target,
            Reason.CLOCK_SET_BACK,
            f"the clock of node {node} was set back after the container started, so what its "
            "engine confirms cannot be told from"
            " an earlier life: mend the clock, and restart the container unless the clock "
            "passes that start soon",
        )
    return None


def of_older_agent(target: Target) -> Failure | None:
    """What keeps a pod back from a version that may only be taken with golden tokens, though nothing
    speaks against it: its agent is of a release that would not ask for them. None: it is not.
    """
    engine = target.engine
    # whoever answers requests has said its kind in its hello, and such an agent does not pass it on
    if engine is None or engine.phase not in STILL_SERVING_PHASES or engine.kind:
        return None
    version = target.state.status.agent_version if target.state else ""
    return _failure(
        target,
        Reason.AGENT_TOO_OLD,
        f"the agent of node {target.pod.node} ({version or 'of an unknown release'}) does not ask "
        "for golden tokens, and activation.probe is Golden: update the agents' DaemonSet, or set "
        "activation.probe to Any",
    )


def _failure(target: Target, reason: str, message: str, uid: str | None = None) -> Failure:
    return Failure(
        pod=target.pod.name,
        pod_uid=target.pod.uid if uid is None else uid,
        node=target.pod.node,
        # an agent's words, cut to what the schema takes
        reason=reason[:64],
        message=(message or reason)[:_MAX_MESSAGE],
    )
