"""What the users of a Service get while pods are told to change: the budget, and that nobody
changes unprepared. By the truth.

An order is followed from the write that gave it until its pod is Ready with what it was told, by
the kubelet's word. An operator is excused where it could not know better: a pod of which its watch
has only just told it, or one that it sees Ready with the gate and the label of what it was told,
long enough after the gate for any kubelet to have said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from hotweights_crds.base import digest_label
from hotweights_crds.nodeweights import PodAssignment
from hotweights_operator.model.objects import NodeState, Pod, Rollout
from hotweights_operator.sim.cluster.world import JudgeContext
from hotweights_operator.sim.invariants import limit_of

KUBELET_SECONDS = 2.0  # its longest lag in this world (`kubelet`)
STRANGER_SECONDS = 60.0  # for a pod that never was Ready, after which it may be left out
USELESS_SECONDS = 290.0  # after which a pod may be left out of the budget
CRASH_LOOP_RESTARTS = 2  # with which it may be, too
SEEN_STEPS = 6  # within which an operator that is awake has decided anew about what it saw


@dataclass(slots=True)
class Order:
    """A pod that served and was told to serve something else."""

    rollout: str
    digest: str


class AvailabilityJudge:
    """All orders that are not carried out yet."""

    def __init__(self, bench: JudgeContext) -> None:
        self._bench = bench
        self._world = bench.world
        self._orders: dict[str, Order] = {}  # by pod UID
        self._down_since: dict[str, datetime] = {}
        self._seen: dict[
            str, tuple[bool, int]
        ] = {}  # pod UID → Ready or not, as the operator sees it, for how many steps

    # -- orders ---------------------------------------------------------------------------------

    def told(self, rollout: Rollout, old: PodAssignment | None, new: PodAssignment) -> None:
        """A pod's entry has been written."""
        uid, engine = new.uid, self._world.fleet.engines.get(new.uid)
        if old is not None and old.digest == new.digest:
            return
        if engine is None or engine.boots:
            self._count_boot(rollout, new.digest)
        elif new.digest in self._bench.serves(uid):
            self._bench.count("set back to what it serves")
        elif self._world.fleet.kubelets.in_service(uid) and not self._world.zombie:
            self._bench.count("told to change")
            seen: Pod | None = self._world.operator.cache.get("pod", uid)
            if (
                seen is not None and seen.ready and self._seen_as(uid, ready=True)
            ):  # else it was of no service, when decided
                self._may_change(rollout, new)
                self._within_budget(rollout, uid)
            self._orders.setdefault(uid, Order(rollout.uid, new.digest))

    def counts_now(self, uid: str, digest: str) -> None:
        """Whoever wrote it, this is what a pod is told now."""
        if uid in self._orders:
            self._orders[uid].digest = digest

    def is_under_way(self, pod: Pod) -> bool:
        """Whether a pod is known not to be Ready yet with what it was told."""
        order = self._orders.get(pod.uid)
        return (
            order is not None and not self._shows(pod, order) and not self._seems_back(pod, order)
        )

    def _count_boot(self, rollout: Rollout, digest: str) -> None:
        status = rollout.status
        if digest and digest == status.target.digest:
            self._bench.count("boots into the target")
        elif digest and digest == status.stable.digest:
            self._bench.count("boots into the stable version")

    def _may_change(self, rollout: Rollout, new: PodAssignment) -> None:
        """A pod that serves changes only to what its node holds and its engine has prepared, and
        not while the rollout is paused.
        """
        state: NodeState = self._world.api.get("state", self._world.api.get("pod", new.uid).node)
        said = state.engine(new.uid)
        if said is not None and said.phase == "Dirty":
            return
        if new.digest and not state.holds(new.digest):
            self._bench.fails("only what is staged", new.uid)
        if new.digest and (said is None or said.prepared != new.digest):
            self._bench.fails("only what is prepared", new.uid)
        known: Rollout | None = self._world.operator.cache.get(
            "rollout", f"{rollout.namespace}/{rollout.name}"
        )
        if known is not None and known.spec.paused:
            self._bench.fails(
                "holds still",
                f"{new.uid} was told to serve {new.digest} although spec.paused was seen",
            )

    # -- the budget -----------------------------------------------------------------------------

    def _within_budget(self, rollout: Rollout, uid: str) -> None:
        """maxUnavailable as a Service sees it, and nobody switches the last one that serves."""
        if rollout.spec.strategy.type == "AllAtOnce" or uid in self._orders:
            return
        own = self._bench.own(rollout)
        counted = [pod for pod in own if pod.uid == uid or not self._may_be_left_out(pod)]
        limit = max(limit_of(rollout, len(own)), limit_of(rollout, len(self._bench.seen(rollout))))
        out = sorted(pod.uid for pod in counted if pod.uid != uid and self._is_out(pod))
        if len(out) + 1 >= len(counted) > limit:
            self._bench.fails(
                "nobody switches the last one that serves", f"{uid}, while {out} are of no service"
            )
        if len(out) + 1 > limit:
            detail = (
                f"{uid} was told to change while {out} of {len(own)} are of no service, {limit} "
                "allowed"
            )
            self._bench.fails("maxUnavailable as a Service sees it", detail)

    def _may_be_left_out(self, pod: Pod) -> bool:
        since = self._down_since.get(pod.uid)
        if since is None:
            return False
        patience = (
            USELESS_SECONDS if pod.was_ready else STRANGER_SECONDS
        )  # an engine that is not heard of may be none of ours
        useless = self._world.now >= since + timedelta(seconds=patience)
        return useless or pod.restarts >= CRASH_LOOP_RESTARTS

    def _is_out(self, pod: Pod) -> bool:
        """Whether a pod is of no service, by an order of the operator or so that the operator
        knew.
        """
        order = self._orders.get(pod.uid)
        if order is not None:
            return not (
                self._shows(pod, order) and self._has_baked(pod, order)
            ) and not self._seems_back(pod, order)
        seen: Pod | None = self._world.operator.cache.get("pod", pod.uid)
        known = seen is not None and not seen.ready and self._seen_as(pod.uid, ready=False)
        return known and not self._world.fleet.kubelets.in_service(pod.uid)

    def _seen_as(self, uid: str, *, ready: bool) -> bool:
        """Whether the operator has seen a pod so for long enough to have decided by it."""
        then, steps = self._seen.get(uid, (not ready, 0))
        return then == ready and steps >= SEEN_STEPS

    def _shows(self, pod: Pod, order: Order) -> bool:
        """Whether it serves what it was told, and a Service knows."""
        engine, container = (
            self._world.fleet.engines.get(pod.uid),
            self._world.fleet.kubelets.containers[pod.uid],
        )
        serves = (
            engine is not None and engine.phase == "Serving" and order.digest in ("", engine.digest)
        )
        return serves and pod.ready and _marked(pod, order) and not container.news

    def _has_baked(self, pod: Pod, order: Order) -> bool:
        """Whether it has been Ready for minReadySeconds since it changed. Kubernetes cuts times to
        whole seconds.
        """
        container, bake = self._world.fleet.kubelets.containers[pod.uid], self._bake(pod, order)
        if not bake or container.gate_at is None:
            return True
        since = max(filter(None, (container.gate_at, container.label_at, container.ready_at)))
        return self._world.now >= since + bake

    def _bake(self, pod: Pod, order: Order) -> timedelta:
        """How long it must have been Ready. Where a clock is wrong, nobody can tell."""
        rollout = self._bench.rollout(order.rollout)
        seconds = rollout.spec.min_ready_seconds if rollout is not None else 0
        off = pod.node in self._world.fleet.kubelets.clocks
        return timedelta(0) if off else timedelta(seconds=max(0, seconds - 1))

    def _seems_back(self, pod: Pod, order: Order) -> bool:
        """Whether an operator may take it for that: it sees it Ready, the gate and the label, and
        the kubelet had its time.
        """
        container = self._world.fleet.kubelets.containers[pod.uid]
        gate_at = container.gate_at
        seen: Pod | None = self._world.operator.cache.get("pod", pod.uid)
        if gate_at is None or seen is None or not seen.ready or not _marked(seen, order):
            return False
        if not order.digest and seen != pod:
            # set back to what it booted, it shows again what it showed before: an old view tells
            # nothing
            return True
        bake, now = self._bake(pod, order), self._world.now
        shown_at = max(gate_at, container.label_at or gate_at)
        waited = now >= shown_at + max(bake, timedelta(seconds=KUBELET_SECONDS))
        return waited and (not bake or seen.ready_since is None or now >= seen.ready_since + bake)

    # -- after every step -----------------------------------------------------------------------

    def step(self) -> None:
        """Forget orders whose pods are of service again, or gone."""
        kubelets = self._world.fleet.kubelets
        for pod in kubelets.pods():
            if kubelets.in_service(pod.uid):
                self._down_since.pop(pod.uid, None)
            else:
                self._down_since.setdefault(pod.uid, self._world.now)
            seen: Pod | None = self._world.operator.cache.get("pod", pod.uid)
            if seen is not None:
                then, steps = self._seen.get(pod.uid, (seen.ready, 0))
                self._seen[pod.uid] = (seen.ready, steps + 1 if then == seen.ready else 1)
        for uid, order in list(self._orders.items()):
            known: Pod | None = self._world.api.get("pod", uid)
            state: NodeState | None = (
                self._world.api.get("state", known.node) if known is not None else None
            )
            if known is None or not known.live or state is None or state.assigned(uid) is None:
                del self._orders[uid]  # gone, or nobody can know of it any more
            elif self._shows(known, order):
                if self._has_baked(known, order):
                    del self._orders[uid]
                else:
                    self._bench.count("waits until pods have been Ready for long enough")


def _marked(pod: Pod, order: Order) -> bool:
    """Whether its agent says of a pod that it serves what it was told; nothing: whatever it
    serves.
    """
    return pod.gate and (not order.digest or pod.digest_label == digest_label(order.digest))
