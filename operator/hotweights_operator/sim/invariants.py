"""What must hold of every decision, for what the operator saw, each with a name, computed anew and
not by the code that is checked.

What came of it, for those who use the pods, is judged in `judge`. A violation stops the simulation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from hotweights_crds.conditions import find, is_true
from hotweights_crds.nodeweights import EngineStatus, PodAssignment, RolloutAssignment
from hotweights_crds.weightrollout import MAX_FAILURES, MAX_HISTORY, WeightRolloutStatus
from hotweights_operator.model.actions import Action, Assign, RolloutDecision
from hotweights_operator.model.objects import NodeState, Pod, Rollout
from hotweights_operator.model.observed import Observed
from hotweights_operator.model.selectors import selects
from hotweights_operator.sim.cluster.agents import Confirmation

# as kubelets forget a container's back-off: who ran so long does not restart for ever
SHORT_RUN_SECONDS = 600.0


class Violated(Exception):
    """An invariant does not hold; ``name`` is what it is called in the tests and by --ignore."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(f"{name}: {detail}")
        self.name = name
        self.detail = detail


def limit_of(rollout: Rollout, desired: int) -> int:
    """How many pods may be of no service at once."""
    strategy = rollout.spec.strategy
    if strategy.type == "AllAtOnce":
        return desired
    value = strategy.rolling.max_unavailable if strategy.rolling else 1
    # a text is a percentage ("25%"), rounded down, but one pod may always change
    return max(1, desired * int(value[:-1]) // 100) if isinstance(value, str) else value


def zero_false_commits(
    rollout: Rollout, view: Observed, decision: RolloutDecision, truth: Collection[Confirmation]
) -> None:
    """No pod is reported on a version that its engine did not confirm in its container's present
    life.
    """
    if decision.status is None:
        return
    digest = decision.status.target.digest
    proved = 0
    for pod in _own(rollout, view):
        engine = _engine(pod, view)
        if engine is not None and _alive(pod.node, view) and engine.digest == digest:
            proved += (pod.uid, digest, pod.restarts) in truth
    if decision.status.pods.updated > proved:
        raise Violated(
            "zero false commits", f"{decision.status.pods.updated} pods reported, {proved} proved"
        )
    pods = decision.status.pods
    if pods.golden + pods.ran > pods.updated:
        raise Violated("zero false proofs", f"{pods.golden} + {pods.ran} of {pods.updated}")


def holds_still(rollout: Rollout, view: Observed, decision: RolloutDecision) -> None:
    """While a rollout is paused or given up, no pod that serves is told to change, and new pods get
    what is stable.
    """
    status = decision.status
    if status is None or not status.target.digest:
        return
    aborted = status.revision > 0 and status.aborted_revision == status.revision
    if not (rollout.spec.paused or is_true(status.conditions, "Paused") or aborted):
        return
    target = status.target.digest
    if target == status.stable.digest or _was_complete(status):
        return
    for _, order, before in told(view, decision.actions):
        pod, engine = view.pods.get(order.uid), _engine_of(order.uid, view)
        if order.digest != target or (before is not None and before.digest == target):
            continue
        if engine is not None and (engine.digest == target or engine.phase == "Dirty"):
            continue
        if (
            engine is not None
            and engine.failed is not None
            and engine.failed.digest == status.stable.digest
        ):
            continue  # it boots, and has given up what is stable: nothing else is left
        if pod is None or pod.live:
            raise Violated(
                "holds still", f"{order.uid} was told to serve the version that is held back"
            )


def all_prepare_first(rollout: Rollout, view: Observed, decision: RolloutDecision) -> None:
    """Before the first pod of a revision changes, every pod that can has prepared (or refused) the
    version.
    """
    status = decision.status
    if status is None or rollout.status.prepared_revision == status.revision:
        return
    target = status.target.digest
    if target == status.stable.digest or status.goes_back:
        return
    changed = [
        order
        for _, order, before in told(view, decision.actions)
        if _changes(order, before, target, view)
    ]
    if not changed:
        return
    excused = {failure.pod_uid for failure in status.failures} | {
        failure.pod for failure in status.failures
    }
    for pod in _own(rollout, view):
        engine, state = _engine(pod, view), view.states.get(pod.node)
        if (
            engine is None
            or state is None
            or not _alive(pod.node, view)
            or engine.phase not in ("Serving", "Preparing")
        ):
            continue
        before = state.assigned(pod.uid)
        ran = pod.last_run_seconds
        restless = (
            pod.restarts > 0 and ran is not None and ran < SHORT_RUN_SECONDS
        )  # it takes the version when it is calm
        if restless or target in (engine.digest, engine.prepared, before.digest if before else ""):
            continue
        if pod.uid not in excused and pod.name not in excused:
            raise Violated(
                "all prepare first",
                f"{pod.uid} had not prepared when {changed[0].uid} was told to change",
            )


def tokens_grow(before: NodeState | None, after: NodeState, live: Collection[str]) -> None:
    """What a pod is told never carries a lower token than before, and something else always a
    higher one.
    """
    for uid in {p.uid for e in after.spec.rollouts for p in e.pods if p.uid in live}:
        old, new = _assigned(before, uid), _assigned(after, uid)
        if old is None or new is None:
            continue
        if new[0] < old[0] or (new[1] != old[1] and new[0] <= old[0]):
            raise Violated("tokens grow", f"{uid}: {old} became {new}")


def keeps_what_pods_need(
    before: RolloutAssignment | None,
    after: RolloutAssignment | None,
    last_complete: str,
    *,
    in_progress: bool,
) -> None:
    """The last complete version stays staged while another one is rolled out, and what a pod is
    assigned always does.
    """
    if before is None or after is None:
        return
    was, now = {item.digest for item in before.stage}, {item.digest for item in after.stage}
    if in_progress and last_complete in was - now:
        raise Violated("the stable version stays staged", last_complete)
    for pod in after.pods:
        if pod.digest in was - now:
            raise Violated("what a pod serves stays staged", pod.digest)


def orphans_keep(
    before: NodeState, after: RolloutAssignment | None, served: dict[str, str]
) -> None:
    """A pod that loses its rollout is told to keep what it serves."""
    for pod in after.pods if after else ():
        order = _assigned(before, pod.uid)
        if (
            order is not None
            and order[1]
            and order[1] == served.get(pod.uid)
            and pod.digest != order[1]
        ):
            raise Violated(
                "orphans keep what they serve",
                f"{pod.uid}: {order[1]} became {pod.digest or 'nothing'}",
            )


def says_why(decision: RolloutDecision) -> None:
    """A rollout that is not Ready says why, in a condition that programs and people understand; and
    the status is bounded.
    """
    status = decision.status
    if status is None:
        return
    ready = find(status.conditions, "Ready")
    if ready is None or not ready.reason or not ready.message:
        raise Violated("says why", "no reason for Ready")
    stalled = is_true(status.conditions, "Stalled")
    others = [
        stalled,
        is_true(status.conditions, "Reconciling"),
        is_true(status.conditions, "Paused"),
    ]
    if ready.status == "True" and (stalled or others[1]):
        raise Violated("says why", "Ready beside Stalled or Reconciling")
    if ready.status != "True" and not any(others):
        raise Violated("says why", "neither Ready nor Reconciling, Paused or Stalled")
    if (
        len(status.failures) > MAX_FAILURES
        or len(status.history) > MAX_HISTORY
        or len(status.conditions) > 12
    ):
        raise Violated("bounded", "the status is too long")


def told(
    view: Observed, actions: Sequence[Action]
) -> Iterator[tuple[NodeState, PodAssignment, PodAssignment | None]]:
    """What each pod is told by these actions, and what it was told before."""
    for action in actions:
        if isinstance(action, Assign) and action.entry is not None:
            state = view.states[action.node]
            for order in action.entry.pods:
                yield state, order, state.assigned(order.uid)


def _changes(
    order: PodAssignment, before: PodAssignment | None, target: str, view: Observed
) -> bool:
    """Whether a pod that serves something else is told to serve the target."""
    engine, pod = _engine_of(order.uid, view), view.pods.get(order.uid)
    if order.digest != target or before is None or before.digest == target or engine is None:
        return False
    if pod is None or not pod.ready:
        return False
    boots = engine.phase in ("Booting", "Disconnected") or (
        engine.failed is not None and engine.failed.booting
    )
    return not boots and engine.digest != target


def _was_complete(status: WeightRolloutStatus) -> bool:
    return any(
        entry.revision == status.revision and entry.outcome == "Complete"
        for entry in status.history
    )


def _own(rollout: Rollout, view: Observed) -> list[Pod]:
    """The rollout's live pods, by the rule in words: the oldest rollout that selects a pod owns
    it.
    """
    found = []
    rivals = [
        r for r in view.rollouts.values() if r.namespace == rollout.namespace and not r.terminating
    ]
    for pod in view.pods.values():
        if pod.live and pod.namespace == rollout.namespace:
            fits = [r for r in rivals if selects(r.spec.target.selector, pod.labels)]
            if fits and min(fits, key=lambda r: (r.created_at, r.uid)).uid == rollout.uid:
                found.append(pod)
    return found


def _engine(pod: Pod, view: Observed) -> EngineStatus | None:
    state = view.states.get(pod.node)
    return next((e for e in state.status.engines if e.pod_uid == pod.uid), None) if state else None


def _engine_of(uid: str, view: Observed) -> EngineStatus | None:
    pod = view.pods.get(uid)
    return _engine(pod, view) if pod is not None else None


def _alive(node: str, view: Observed) -> bool:
    return view.follows(node)


def _assigned(state: NodeState | None, uid: str) -> tuple[int, str] | None:
    orders = [
        (p.token, p.digest)
        for e in (state.spec.rollouts if state else ())
        for p in e.pods
        if p.uid == uid
    ]
    return max(orders) if orders else None
