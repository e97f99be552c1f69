"""What must hold after every step, each with a name, computed anew from the facts and not by the code that is checked.

Where something is compared with what the operator could know, it is compared with its view; where only the truth counts, with
the truth. A violation stops the simulation.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from hotweights_crds.conditions import find, is_true
from hotweights_crds.nodeweights import EngineStatus, RolloutAssignment
from hotweights_crds.weightrollout import MAX_FAILURES, MAX_HISTORY
from hotweights_operator.actions import Action, Assign, RolloutDecision
from hotweights_operator.model import NodeState, Observed, Pod, Rollout
from hotweights_operator.selectors import selects
from hotweights_operator.sim.fleet import Confirmation


class Violated(Exception):
    """An invariant does not hold."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(f"{name}: {detail}")
        self.name = name


def _own(rollout: Rollout, view: Observed) -> list[Pod]:
    """The rollout's live pods, by the rule in words: the oldest rollout that selects a pod owns it."""
    found = []
    for pod in view.pods:
        fits = [
            r for r in view.rollouts if r.namespace == pod.namespace and selects(r.spec.target.selector, pod.labels)
        ]
        if pod.live and fits and min(fits, key=lambda r: (r.created_at, r.uid)).uid == rollout.uid:
            found.append(pod)
    return found


def _engine(pod: Pod, view: Observed) -> EngineStatus | None:
    state = view.states.get(pod.node)
    return next((e for e in state.status.engines if e.pod_uid == pod.uid), None) if state else None


def _alive(node: str, view: Observed) -> bool:
    return node in view.nodes and view.nodes[node].ready and view.agents.get(node, False)


def _assigned(state: NodeState | None, uid: str) -> tuple[int, str] | None:
    orders = [(p.token, p.digest) for e in (state.spec.rollouts if state else ()) for p in e.pods if p.uid == uid]
    return max(orders) if orders else None


def zero_false_commits(
    rollout: Rollout, view: Observed, decision: RolloutDecision, truth: Sequence[Confirmation]
) -> None:
    """No pod is reported on a version that its engine did not confirm after its container's last start."""
    if decision.status is None:
        return
    digest = decision.status.target.digest
    proved = 0
    for pod in _own(rollout, view):
        since, engine = pod.engine_started_at, _engine(pod, view)
        if since is None or engine is None or not _alive(pod.node, view) or engine.digest != digest:
            continue
        proved += any(u == pod.uid and d == digest and at >= since for u, d, at in truth)
    if decision.status.pods.updated > proved:
        raise Violated("zero false commits", f"{decision.status.pods.updated} pods reported, {proved} proved")


def _limit(rollout: Rollout, desired: int) -> int:
    strategy = rollout.spec.strategy
    if strategy.type == "AllAtOnce":
        return desired
    value = strategy.rolling.max_unavailable if strategy.rolling else 1
    return max(1, desired * int(value[:-1]) // 100) if isinstance(value, str) else value


def _confirmed_life(pod: Pod, engine: EngineStatus | None) -> bool:
    """Whether what the engine confirmed was confirmed in this life."""
    if engine is None or not engine.confirmed_at or pod.engine_started_at is None:
        return False
    return datetime.fromisoformat(engine.confirmed_at) >= pod.engine_started_at + timedelta(seconds=1)


def _is_out(pod: Pod, view: Observed) -> bool:
    """Whether a pod that was of service is not, as far as the view tells."""
    order = _assigned(view.states.get(pod.node), pod.uid)
    engine = _engine(pod, view)  # also what an agent that is gone said last: without one an engine only restarts
    settled = engine is not None and engine.phase in ("Serving", "Preparing", "Prepared", "Refused", "Failed")
    serves = settled and engine is not None and order is not None and engine.digest == order[1]
    outstanding = order is not None and order[1] != "" and not (serves and _confirmed_life(pod, engine))
    return pod.was_ready and (not pod.ready or outstanding)


@dataclass(frozen=True, slots=True)
class Changed:
    """A pod that an action tells to serve something else."""

    pod: Pod
    state: NodeState
    digest: str


def changes(rollout: Rollout, view: Observed, actions: Sequence[Action]) -> list[Changed]:
    """Pods that served something and are told to serve the target now."""
    found = []
    for action in actions:
        if not isinstance(action, Assign) or action.entry is None:
            continue
        state = view.states[action.node]
        for order in action.entry.pods:
            before, pod = _assigned(state, order.uid), view.pods_by_uid.get(order.uid)
            if pod is None or before is None or before[1] == order.digest or not order.digest:
                continue
            if not _boots(pod, view):
                found.append(Changed(pod, state, order.digest))
    return found


def _boots(pod: Pod, view: Observed) -> bool:
    """Whether the pod has not been of service yet, or waits to be told what to boot into."""
    engine = _engine(pod, view) if _alive(pod.node, view) else None
    idle = engine is None or engine.phase in ("Booting", "Disconnected")
    return idle and (not pod.was_ready or (engine is not None and engine.phase == "Booting"))


def within_budget(rollout: Rollout, view: Observed, actions: Sequence[Action], target: str) -> None:
    """No more pods become unavailable than the strategy allows."""
    own = _own(rollout, view)
    out = {pod.uid for pod in own if _is_out(pod, view)}
    new = {c.pod.uid for c in changes(rollout, view, actions) if c.digest == target} - out
    new = {uid for uid in new if view.pods_by_uid[uid].was_ready}
    limit = _limit(rollout, len(own))
    if new and len(out) + len(new) > limit:
        raise Violated("within budget", f"{len(out)} out, {len(new)} more told to change, {limit} allowed")


def holds_still(rollout: Rollout, view: Observed, actions: Sequence[Action], decision: RolloutDecision) -> None:
    """A paused or aborted rollout, and one beyond its failure policy, starts no activation."""
    status = decision.status
    if status is None:
        return
    paused = rollout.spec.paused or is_true(status.conditions, "Paused")
    aborted = status.revision > 0 and status.aborted_revision == status.revision
    too_many = status.pods.failed > rollout.spec.failure_policy.max_failed and not is_true(status.conditions, "Ready")
    if not (paused or aborted or too_many):
        return
    target = status.target.digest
    if not target:
        return
    if any(change.digest == target for change in changes(rollout, view, actions) if not _repairs(change, view)):
        raise Violated("holds still", "a pod was told to change")
    complete = any(entry.revision == status.revision and entry.outcome == "Complete" for entry in status.history)
    if complete:
        return
    for action in actions:
        for order in action.entry.pods if isinstance(action, Assign) and action.entry else ():
            before, pod = _assigned(view.states[action.node], order.uid), view.pods_by_uid.get(order.uid)
            is_new = before is None or (pod is not None and not pod.was_ready and before[1] != target)
            if is_new and order.digest == target and (pod is None or pod.live):
                engine = _engine(view.pods_by_uid[order.uid], view) if order.uid in view.pods_by_uid else None
                if engine is None or engine.digest != target:
                    raise Violated("holds still", f"the new pod {order.uid} was given the version that is held back")


def _repairs(change: Changed, view: Observed) -> bool:
    """Whether the pod is set back to what it serves."""
    engine = _engine(change.pod, view)
    return engine is not None and (engine.digest == change.digest or engine.phase == "Dirty")


def only_what_is_ready(rollout: Rollout, view: Observed, actions: Sequence[Action], target: str) -> None:
    """A pod changes only to what its node holds completely and its engine has prepared, after all others prepared it too."""
    changed = [c for c in changes(rollout, view, actions) if c.digest == target and not _repairs(c, view)]
    for change in changed:
        staged = change.state.staged(change.digest)
        engine = change.state.engine(change.pod.uid)
        if staged is None or staged.phase != "Staged":
            raise Violated("only what is staged", change.pod.uid)
        if engine is None or engine.prepared != change.digest:
            raise Violated("only what is prepared", change.pod.uid)
    if not changed:
        return
    for pod in _own(rollout, view):
        engine, order = _engine(pod, view), _assigned(view.states.get(pod.node), pod.uid)
        able = engine is not None and _alive(pod.node, view) and engine.phase in ("Serving", "Preparing")
        if (
            able
            and engine is not None
            and target not in (engine.digest, engine.prepared)
            and (not order or order[1] != target)
        ):
            staged = view.states[pod.node].staged(target)
            if staged is None or staged.phase != "Failed":
                raise Violated("all prepare first", f"{pod.uid} had not prepared")


def tokens_grow(before: NodeState | None, after: NodeState, live: Collection[str]) -> None:
    """What a pod is told never carries a lower token than before, and something else always a higher one."""
    for uid in {p.uid for e in after.spec.rollouts for p in e.pods if p.uid in live}:
        old, new = _assigned(before, uid), _assigned(after, uid)
        if old is None or new is None:
            continue
        if new[0] < old[0] or (new[1] != old[1] and new[0] <= old[0]):
            raise Violated("tokens grow", f"{uid}: {old} became {new}")


def keeps_what_pods_need(
    before: RolloutAssignment | None, after: RolloutAssignment | None, last_complete: str, *, in_progress: bool
) -> None:
    """The last complete version stays staged while another one is rolled out, and what a pod is assigned always does."""
    if before is None or after is None:
        return
    was, now = {item.digest for item in before.stage}, {item.digest for item in after.stage}
    if in_progress and last_complete in was - now:
        raise Violated("the previous version stays staged", last_complete)
    for pod in after.pods:
        if pod.digest in was - now:
            raise Violated("what a pod serves stays staged", pod.digest)


def orphans_keep(before: NodeState, after: RolloutAssignment | None, served: dict[str, str]) -> None:
    """A pod that loses its rollout is told to keep what it serves."""
    for pod in after.pods if after else ():
        order = _assigned(before, pod.uid)
        if order is not None and order[1] and order[1] == served.get(pod.uid) and pod.digest != order[1]:
            raise Violated("orphans keep what they serve", f"{pod.uid}: {order[1]} became {pod.digest or 'nothing'}")


def says_why(decision: RolloutDecision) -> None:
    """A rollout that is not Ready says why, in a condition that programs and people understand; and the status is bounded."""
    status = decision.status
    if status is None:
        return
    ready = find(status.conditions, "Ready")
    if ready is None or not ready.reason or not ready.message:
        raise Violated("says why", "no reason for Ready")
    stalled = is_true(status.conditions, "Stalled")
    others = [stalled, is_true(status.conditions, "Reconciling"), is_true(status.conditions, "Paused")]
    if ready.status == "True" and (stalled or others[1]):
        raise Violated("says why", "Ready beside Stalled or Reconciling")
    if ready.status != "True" and not any(others):
        raise Violated("says why", "neither Ready nor Reconciling, Paused or Stalled")
    if len(status.failures) > MAX_FAILURES or len(status.history) > MAX_HISTORY or len(status.conditions) > 12:
        raise Violated("bounded status", "too long")
