"""All that is known about one pod of a rollout, as one frozen value.

What the pod object shows and what its node's agent says come by different watches, so neither is
taken for the other: a version is served by the engine's word alone, and a pod is of service by the
pod object's alone. This knows evidence, no strategy.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from hotweights_common import timestamps
from hotweights_crds.base import digest_label
from hotweights_crds.nodeweights import EngineStatus, GivenUp, PodAssignment
from hotweights_operator.model.objects import (
    SETTLED_PHASES,
    START_GRANULARITY,
    STILL_SERVING_PHASES,
    Node,
    NodeState,
    Pod,
    confirmed,
)
from hotweights_operator.model.pod_history import PodHistory, is_connected

LOOP_SECONDS = 600.0
"""A container that ran for longer before it ended is not in a loop; the kubelet forgets its
back-off then, too (https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle).
"""

CALM_SECONDS = 60.0
"""A container that ended soon after it started must be of service for so long before more is asked
of it than to serve.
"""

SETTLE_SECONDS = 2.0
"""How long the kubelet may take to see that a gate has changed twice, and then to say Ready=False
after all. It sets Ready by the gates (KEP-580, pod readiness gates), and nobody else does.
"""


@dataclass(frozen=True, slots=True)
class Target:
    """A pod, and what its node's agent says of it. ``engine`` is None unless that word counts
    now.
    """

    pod: Pod
    node: Node | None  # None: it has none yet, or that is gone
    state: NodeState | None  # None: the node has no object yet
    engine: EngineStatus | None
    # what its engine gave up last: that stays so though the agent who wrote it is gone
    failed: GivenUp | None
    assigned: PodAssignment | None  # None: nobody has told it anything yet
    follows: bool  # its node's agent is there and speaks
    answered: bool  # the agent has seen the spec as it stands
    seen: PodHistory
    proved: str  # the digest that its engine has proved to serve; empty: none, or what it booted
    outstanding: bool  # it was told to serve something and has not proved that it does
    # how often its container ended soon after it started, since it was told what it is told
    crashes: int
    # its container did, before it ended last since then: what ended before that counts no more
    ran_long: bool
    # only the answer to an order that is yet to be written can tell whether it serves what it is
    # told
    is_doubted: bool

    @property
    def connected(self) -> bool:
        """Whether its engine talks to the agent."""
        return is_connected(self.engine)

    @property
    def told(self) -> str:
        """The digest that it is to serve; empty: whatever it booted, or nobody has said."""
        return self.assigned.digest if self.assigned else ""

    @property
    def booting(self) -> bool:
        """Whether what comes next is that it opens its port: it asks what to serve, or has never
        been of service, or starts again.
        """
        if self.pod.ready:  # and what its agent says is of a moment before
            return False
        if self.engine is not None and self.engine.phase == "Booting":
            return True
        # it failed before its port opened, and has confirmed nothing since
        if (
            self.engine is not None
            and self.engine.phase in ("Refused", "Failed")
            and self.engine.failed is not None
        ):
            return self.engine.failed.booting and not self.engine.confirmed_at
        # whatever else its engine does, it does with its port open
        if self.engine is not None and self.engine.phase != "Disconnected":
            return False
        # without an engine to be heard: in the kubelet's back-off, or before its first start
        return not self.pod.was_ready or self.crashes > 0

    def serves(self, digest: str) -> bool:
        """Whether its engine has proved that it serves this digest."""
        return bool(digest) and self.proved == digest

    def prepared(self, digest: str) -> bool:
        """Whether a commit of this digest would be only a pause."""
        return self.engine is not None and bool(digest) and self.engine.prepared == digest

    def gave_up(self, digest: str, rollout_uid: str, revision: int) -> bool:
        """Whether the engine was asked to take this version in this revision, and will not be asked
        again. A rollout that was made anew counts its revisions from one again, and a pod may come
        from another one.
        """
        failed = self.failed
        # empty: its order was of none, or of a release before 0.2
        if failed is None or failed.rollout not in ("", rollout_uid):
            return False
        return (failed.digest, failed.revision) == (digest, revision)

    def was_told_in(self, rollout_uid: str, revision: int) -> bool:
        """Whether what it is told now was said in this revision of this rollout."""
        order = self.assigned
        return (
            order is not None and order.rollout in ("", rollout_uid) and order.revision == revision
        )

    @property
    def gave_up_its_order(self) -> bool:
        """Whether what it is told is what it gave up."""
        failed, told = self.failed, self.assigned
        return (
            failed is not None
            and told is not None
            and (failed.digest, failed.token, failed.revision)
            == (told.digest, told.token, told.revision)
        )

    @property
    def available(self) -> bool:
        """Whether the pod object shows that it is of service with what it is told: Ready, and the
        gate and label of that version, which its agent writes in one go. An engine's word reaches
        us before the kubelet's.
        """
        # the agent takes the gate away too, but that comes by another watch
        broken = self.engine is not None and self.engine.phase in ("Dirty", "Committing")
        return self.is_shown and not self.outstanding and not broken

    @property
    def is_shown(self) -> bool:
        """The same by the pod object alone: whether requests still reach it."""
        # nobody opens a gate before there is an order
        if not self.pod.ready or self.assigned is None:
            return self.pod.ready
        return self.pod.gate and (not self.told or self.pod.digest_label == digest_label(self.told))

    def available_for(self, seconds: float, now: datetime) -> bool:
        """The same, for so long, and the kubelet has had its time to see what the agent wrote to
        the gate.
        """
        return self.available and self.wait_seconds(seconds, now) <= 0

    def wait_seconds(self, seconds: float, now: datetime) -> float:
        """How long until one that is available has been so for ``seconds`` and the kubelet has seen
        its gate. By our own clock.
        """
        kubelet_saw = self.pod.gate_since is None or self.seen.answered_gate
        needed = seconds if kubelet_saw else max(seconds, SETTLE_SECONDS)
        return max(0.0, needed - (now - self.seen.shown_since).total_seconds())

    def calm_seconds(self, now: datetime) -> float:
        """How long until one whose container ended soon after it started has lived for long enough;
        0: it is well.
        """
        ran, started_at, served_since = (
            self.pod.last_run_seconds,
            self.pod.engine_started_at,
            self.seen.served_since,
        )
        # it never ended, or not as one that ends by itself does
        if ran is None or ran >= LOOP_SECONDS or not self.pod.restarts:
            return 0.0
        if started_at is not None and (now - started_at).total_seconds() >= LOOP_SECONDS:
            return 0.0  # by whichever clock: this process may have begun to look at it a moment ago
        passed = (now - served_since).total_seconds() if served_since else 0.0
        return max(0.0, CALM_SECONDS - passed)

    def clock_was_set_back(self) -> bool:
        """Whether its engine confirmed what it is told at a time before its container started: by
        the node's own clock.
        """
        engine, started_at = self.engine, self.pod.engine_started_at
        confirmed_at = timestamps.parse(engine.confirmed_at) if engine else None
        # what is proved needs no excuse
        if engine is None or confirmed_at is None or started_at is None or not self.outstanding:
            return False
        return engine.digest == self.told and confirmed_at < started_at + START_GRANULARITY


def build(
    pod: Pod, node: Node | None, state: NodeState | None, seen: PodHistory, *, follows: bool
) -> Target:
    """A pod with what is known about it."""
    said = state.engine(pod.uid) if state else None
    assigned = state.assigned(pod.uid) if state else None
    # A start is shown to be later than what was confirmed before it by the node's clock, unless
    # that was set back in between. What
    # stood there when the start was seen may also be the first word of the new life, if that came
    # sooner: an answer to a later spec
    # tells, for whoever reads that has long noticed that the engine before is gone.
    is_answer = state is not None and state.status.observed_generation > seen.generation
    is_of_before = said is not None and said.confirmed_at == seen.confirmed_before and not is_answer
    confirmed_at = timestamps.parse(said.confirmed_at) if said and not is_of_before else None
    engine = said if follows else None
    proved = (
        said.digest
        if said and follows and confirmed(pod, said, said.digest, confirmed_at, SETTLED_PHASES)
        else ""
    )
    # Without an agent an engine changes only by restarting, so what it confirmed still counts
    # against what it was told.
    told = assigned.digest if assigned else ""
    is_settled = said is not None and confirmed(
        pod, said, told, timestamps.parse(said.confirmed_at)
    )
    outstanding = bool(told) and not confirmed(pod, said, told, confirmed_at, STILL_SERVING_PHASES)
    return Target(
        pod=pod,
        node=node,
        state=state,
        engine=engine,
        failed=said.failed if said else None,
        assigned=assigned,
        follows=follows,
        answered=state is not None and follows and state.current,
        seen=seen,
        proved=proved,
        outstanding=outstanding,
        crashes=_crashes(pod, assigned),
        ran_long=_ran_long(pod, assigned),
        is_doubted=is_of_before
        and is_settled
        and state is not None
        and state.generation <= seen.generation,
    )


def _ran_long(pod: Pod, assigned: PodAssignment | None) -> bool:
    """Restarts are then counted from that run on (`fencing`)."""
    ran = pod.last_run_seconds
    return (
        ran is not None
        and ran >= LOOP_SECONDS
        and assigned is not None
        and pod.restarts > assigned.restarts
    )


def _crashes(pod: Pod, assigned: PodAssignment | None) -> int:
    ran = pod.last_run_seconds
    # none has ended, or the last one ran for so long that it is in no loop
    if ran is None or ran >= LOOP_SECONDS:
        return 0
    return max(0, pod.restarts - (assigned.restarts if assigned else 0))
