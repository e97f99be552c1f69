"""What every pod is to serve, and to prepare, now.

Engines prepare in waves, so that a version whose preparing does harm harms few. Before the first
pod changes, every pod that can must have prepared: what does not fit is refused while everything
serves on. That gate is passed once in a revision; from then on each pod waits for itself only. Then
the budget decides how many change at once.

What every other pod has, it keeps, with three exceptions, looked for in every pass and under every
hold: a pod that boots is given what the rollout wants now, or what is stable while it holds; a pod
that gave up what it is told, or is told what nobody wants any more, is told what it serves; and one
that broke in the middle of a switch is given what is stable to repair itself with.

What can be said of one node's pods alone (`NodePlan`) is remembered for as long as nothing there
changes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from hotweights_crds.nodeweights import PodAssignment
from hotweights_crds.weightrollout import WeightRolloutSpec
from hotweights_operator.decide import disruption_budget
from hotweights_operator.decide.blocked import Rule
from hotweights_operator.model import failures
from hotweights_operator.model.node_totals import NodeTotals
from hotweights_operator.model.objects import SETTLED_PHASES, STILL_SERVING_PHASES, Rollout
from hotweights_operator.model.targets import Target


@dataclass(frozen=True, slots=True)
class RolloutGoal:
    """What the rollout is at."""

    rollout: str  # UID
    revision: int
    target: str  # digest
    stable: str  # digest of what was complete last; empty: what the engines booted
    is_back: bool  # to what was complete before
    rule: Rule
    passed: bool  # everybody who could had prepared at some time of this revision

    @property
    def activates(self) -> bool:
        """Whether pods may change to the target, and new ones boot into it."""
        return self.rule.activates and bool(self.target)


@dataclass(frozen=True, slots=True, eq=False)
class NodePlan:
    """What one node's pods keep or are given, and what could be asked of them beyond that."""

    digests: Mapping[str, str]  # pod UID → digest; pods about which nothing is known are left out
    prepares: frozenset[str]  # UIDs of those that have the target at hand, or were asked to
    waited_for: tuple[Target, ...]  # nobody may change before these have prepared, or refused
    busy: int  # engines that prepare the target
    idle: tuple[Target, ...]  # that could be asked to
    candidates: tuple[Target, ...]  # that could change at once


@dataclass(frozen=True, slots=True)
class ActivationPlan:
    """What every pod is to serve and to prepare, and which of them are told something new just
    now.
    """

    target: str
    node_plans: Mapping[str, NodePlan]  # by node
    activated: frozenset[str]
    asked: frozenset[str]
    nodes: frozenset[str]  # of those two
    # pods that are not asked to prepare yet, because their containers ended soon after they started
    restarted: int
    passes: bool  # the gate is passed, in this pass or an earlier one
    again_in_seconds: float | None  # when more may change though nothing happens

    def told(self, target: Target) -> tuple[str, str] | None:
        """What a pod is to serve and to prepare; None while that cannot be known."""
        uid, plan_node = target.pod.uid, self.node_plans[target.pod.node]
        if uid in self.activated:
            return self.target, ""
        digest = plan_node.digests.get(uid)
        if digest is None:
            return None
        return digest, self.target if uid in plan_node.prepares or uid in self.asked else ""


def plan_activation(
    spec: WeightRolloutSpec,
    goal: RolloutGoal,
    all_totals: Sequence[NodeTotals],
    node_plans: Mapping[str, NodePlan],
    now: datetime,
) -> ActivationPlan:
    """Decide for all pods."""
    desired = sum(len(totals.targets) for totals in all_totals)
    passes = goal.passed or goal.is_back
    again: float | None = None
    activated: list[Target] = []
    if goal.activates:
        passes = passes or all(
            t.calm_seconds(now) for plan_node in node_plans.values() for t in plan_node.waited_for
        )
        candidates = [
            target for plan_node in node_plans.values() for target in plan_node.candidates
        ]
        if passes and candidates:
            activated, again = _activate(spec, candidates, all_totals, desired, now)
    asked, waits = _ask(spec, goal, all_totals, node_plans, desired, now)
    return ActivationPlan(
        target=goal.target,
        node_plans=node_plans,
        activated=frozenset(t.pod.uid for t in activated),
        asked=frozenset(t.pod.uid for t in asked),
        nodes=frozenset(t.pod.node for t in (*activated, *asked)),
        restarted=len(waits),
        passes=passes,
        again_in_seconds=min((wait for wait in (again, *waits) if wait is not None), default=None),
    )


def plan_node(totals: NodeTotals, goal: RolloutGoal, failed: Collection[str]) -> NodePlan:
    """What can be said of one node's pods; ``failed`` are UIDs of those that have failed in this
    revision.
    """
    digest = goal.target
    digests = {
        t.pod.uid: kept
        for t in totals.targets
        if (kept := _kept(t, goal, t.pod.uid in failed)) is not None
    }
    able = [
        t
        for t in totals.targets
        if t.pod.uid not in failed and digests.get(t.pod.uid, digest) != digest
    ]
    # What is said of one that ended since it was asked may be of its life before.
    ready = [t for t in able if t.prepared(digest) and (goal.is_back or not t.crashes)]
    others = [t for t in able if t not in ready]
    everybody = goal.rule.prepares == "All" and bool(digest)
    asked = [t for t in others if _is_asked(t, goal)] if everybody else []
    idle = [
        t
        for t in others
        if t.connected and not _is_asked(t, goal) and t.pod.uid not in totals.unreachable
    ]
    prepares = [] if goal.rule.prepares == "None" else [*ready, *asked]
    return NodePlan(
        digests=digests,
        prepares=frozenset(t.pod.uid for t in prepares),
        waited_for=tuple(
            t
            for t in totals.targets
            if t.pod.uid not in failed
            and t.pod.uid not in totals.unreachable
            and _is_waited_for(t, digest)
        ),
        busy=sum(1 for t in asked if t.connected),
        idle=tuple(idle) if everybody else (),
        candidates=tuple(
            t for t in ready if t.pod.uid not in totals.unreachable and _can_change(t, digest)
        ),
    )


# -- what a pod keeps, or is given because it has nothing ---------------------------------------


def _kept(target: Target, goal: RolloutGoal, has_failed: bool) -> str | None:
    """None while that cannot be known."""
    engine, order = target.engine, target.assigned
    if target.booting:
        return _booted_into(target, goal, has_failed)
    if order is None:
        return engine.digest if engine is not None and engine.phase in SETTLED_PHASES else None
    if engine is None:
        return order.digest
    if not order.digest and target.proved:
        return target.proved  # it may keep what it serves: now it is said what that is
    if engine.phase == "Dirty":
        return (
            goal.stable
            if has_failed or order.digest not in (goal.target, goal.stable)
            else order.digest
        )
    given_up = target.gave_up_its_order or (has_failed and order.digest == goal.target)
    unwanted = order.digest not in (goal.target, target.proved) or _cannot_come(
        target, order.digest
    )
    if target.outstanding and (given_up or unwanted) and engine.phase in STILL_SERVING_PHASES:
        return engine.digest
    return order.digest


def _booted_into(target: Target, goal: RolloutGoal, has_failed: bool) -> str:
    """What a pod is given that is about to open its port: the first of what comes into question
    that its node holds.
    """
    order = target.assigned
    told = [order.digest] if order is not None else []
    wanted = [goal.target] if goal.activates else []
    holds_back = not goal.activates and (goal.rule.gives_up or not target.pod.was_ready)
    if _is_on_its_way(target, goal):
        candidates = [*told, *wanted, goal.stable]
    elif goal.activates:
        candidates = [*wanted, *told, goal.stable]
    elif holds_back:
        candidates = [goal.stable, *told]
    else:
        candidates = [*told, goal.stable]
    if holds_back and goal.target != goal.stable:
        candidates = [digest for digest in candidates if digest != goal.target]
    possible = [
        d for d in dict.fromkeys(candidates) if not _has_given_up(target, d, goal, has_failed)
    ]
    here = (d for d in possible if not d or (target.state is not None and target.state.holds(d)))
    return next(here, next(iter(possible), goal.stable))


def _is_on_its_way(target: Target, goal: RolloutGoal) -> bool:
    """Whether a pod goes on with what it is told: it was told so in this revision and has not
    started again since; or what it serves was well everywhere, and it ended while it was to prepare
    the target, which would then be the first thing that it meets.
    """
    order = target.assigned
    if order is None or not target.was_told_in(goal.rollout, goal.revision):
        return False
    if target.crashes == 0:
        return not _cannot_come(target, order.digest)
    was_well = order.digest == goal.stable and not goal.is_back
    return was_well and order.prepare == goal.target and target.crashes < failures.PREPARE_CRASHES


def _has_given_up(target: Target, digest: str, goal: RolloutGoal, has_failed: bool) -> bool:
    if has_failed and digest == goal.target:
        return True
    if target.gave_up_its_order and digest == target.told:
        return True
    if digest == goal.stable:
        return False
    return _cannot_come(target, digest) or (
        digest == target.told and target.crashes >= failures.CRASHES
    )


def _cannot_come(target: Target, digest: str) -> bool:
    """Whether a version is not to be had on the pod's node: staging it failed, or it is told so and
    nobody knows its source.
    """
    if not digest or target.state is None or not target.follows:
        return False
    staged = target.state.staged(digest)
    if staged is not None:
        return staged.phase == "Failed"
    return target.told == digest and digest not in target.state.listed


# -- who prepares -------------------------------------------------------------------------------


def _ask(
    spec: WeightRolloutSpec,
    goal: RolloutGoal,
    all_totals: Sequence[NodeTotals],
    node_plans: Mapping[str, NodePlan],
    desired: int,
    now: datetime,
) -> tuple[list[Target], list[float]]:
    """The pods that are newly asked to prepare: as many at a time as may be unavailable, or as have
    done it well; and in how many seconds each of those may be that is left alone until then. One
    that ends by itself is left alone, or it would be blamed on what it prepares: it takes the
    target when it boots.
    """
    idle = [target for plan_node in node_plans.values() for target in plan_node.idle]
    if goal.is_back or not idle:
        return idle, []
    waits = [wait for t in idle if (wait := t.calm_seconds(now)) > 0]
    calm = [t for t in idle if not t.calm_seconds(now)]
    done = sum(totals.prepared for totals in all_totals)
    busy = sum(plan_node.busy for plan_node in node_plans.values())
    room = max(disruption_budget.limit(spec.strategy, desired), done) - busy
    return calm[: max(0, room)], waits


def _is_asked(target: Target, goal: RolloutGoal) -> bool:
    """Whether it was asked to prepare, and did not end since: then it is left alone until it is
    calm.
    """
    order = target.assigned
    return (
        order is not None and order.prepare == goal.target and (goal.is_back or not target.crashes)
    )


# -- who changes --------------------------------------------------------------------------------


def _is_waited_for(target: Target, digest: str) -> bool:
    """Whether nobody may change before this pod has prepared (or refused)."""
    engine = target.engine
    if engine is None or not target.connected or target.booting or engine.phase == "Committing":
        return False
    if target.serves(digest) or target.prepared(digest):
        return False
    return target.assigned is None or target.assigned.digest != digest


def _activate(
    spec: WeightRolloutSpec,
    candidates: Sequence[Target],
    all_totals: Sequence[NodeTotals],
    desired: int,
    now: datetime,
) -> tuple[list[Target], float | None]:
    """The pods that change now, in the order of nodes and names; and when more may, though nothing
    happens.
    """
    counts = disruption_budget.count_availability(all_totals, spec.min_ready_seconds, now)
    chosen = disruption_budget.choose(
        candidates, counts, spec.strategy, desired, spec.min_ready_seconds, now
    )
    return chosen, counts.again_in_seconds if len(chosen) < len(candidates) else None


def _can_change(target: Target, digest: str) -> bool:
    """Whether this pod, which has the target at hand, could change at once."""
    order, state = target.assigned, target.state
    return (
        order is not None and order.digest != digest and state is not None and state.holds(digest)
    )


def assignment(
    target: Target,
    digest: str,
    prepare: str,
    rollout: Rollout,
    version: str,
    revision: int,
    ended_preparing: int,
) -> PodAssignment:
    """As it goes into the node's spec; `fencing` gives it its token."""
    spec = rollout.spec
    return PodAssignment(
        uid=target.pod.uid,
        rollout=rollout.uid,
        revision=revision,
        name=target.pod.name,
        namespace=target.pod.namespace,
        digest=digest,
        version=version,
        prepare=prepare,
        mode=spec.activation.mode,
        drain_timeout_seconds=spec.activation.drain_timeout_seconds,
        commit_timeout_seconds=spec.activation.commit_timeout_seconds,
        ended_preparing=ended_preparing,
    )
