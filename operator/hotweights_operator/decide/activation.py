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
from hotweights_crds.weightrollout import WeightRolloutSpec, WeightRolloutStatus
from hotweights_operator.decide import disruption_budget, revision
from hotweights_operator.decide.blocked import Rule
from hotweights_operator.model import failures
from hotweights_operator.model.node_totals import NodeTotals
from hotweights_operator.model.objects import SETTLED_PHASES, STILL_SERVING_PHASES, Rollout
from hotweights_operator.model.targets import Target


@dataclass(frozen=True, slots=True)
class RolloutGoal:
    """What one pass takes the rollout for. Compared by identity where a plan is remembered, so it
    is interned (`rollouts`).
    """

    rollout: str  # UID
    revision: int  # 0: none has begun, and there is no target
    target: str  # digest; empty: no version was resolved yet
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
    now. `assignments` writes it.
    """

    target: str
    node_plans: Mapping[str, NodePlan]  # by node
    activated: frozenset[str]  # UIDs of pods that change in this pass
    asked: frozenset[str]  # UIDs of pods that are asked to prepare in this pass
    nodes: frozenset[str]  # of those two
    # pods that are not asked to prepare yet, because their containers ended soon after they started
    restarted: int
    passes: bool  # the gate is passed, in this pass or an earlier one
    again_in_seconds: float | None  # when more may change though nothing happens; None: never

    def told(self, target: Target) -> tuple[str, str] | None:
        """Two digests: what a pod is to serve and to prepare; None while that cannot be known, and
        then it is left out of the entry. Raises `KeyError` for a pod of a node without a plan.
        """
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
    """What every pod is to serve and to prepare. `rollouts` calls it once in a pass, with the
    totals and plans of every node that has pods of the rollout.
    """
    desired = sum(len(totals.targets) for totals in all_totals)
    # the way back waits for nobody: what it leads to served everywhere before
    passes = goal.passed or goal.is_back
    again: float | None = None
    activated: list[Target] = []
    if goal.activates:
        # one that ends by itself keeps nobody: it takes the target when it boots
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
    revision. It takes no clock: what it gives is remembered until something on the node changes.
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
    # On the way back it is taken all the same: it ended of what it serves.
    ready = [t for t in able if t.prepared(digest) and (goal.is_back or not t.crashes)]
    others = [t for t in able if t not in ready]
    everybody = goal.rule.prepares == "All" and bool(digest)
    asked = [t for t in others if _is_asked(t, goal)] if everybody else []
    # not those whom an order does not reach now: they would take turns, and come all at once later
    idle = [
        t
        for t in others
        if t.connected and not _is_asked(t, goal) and t.pod.uid not in totals.unreachable
    ]
    # a version that was given up need not stay in memory as a second copy
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
    """The digest that a pod is to serve unless it is activated; None while that cannot be known."""
    engine, order = target.engine, target.assigned
    # first of all: it serves nothing, so there is nothing that it could keep
    if target.booting:
        return _booted_into(target, goal, has_failed)
    # nobody has told it anything yet: what it serves becomes its order, once it is settled
    if order is None:
        return engine.digest if engine is not None and engine.phase in SETTLED_PHASES else None
    # its agent is away for now: that is no reason for another order
    if engine is None:
        return order.digest
    if not order.digest and target.proved:
        return target.proved  # it may keep what it serves: now it is said what that is
    # it is paused and repairs itself with what it is told; what broke it once may be tried again
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
    # only where it still serves: a switch under way is let end, and then it says what it serves
    if target.outstanding and (given_up or unwanted) and engine.phase in STILL_SERVING_PHASES:
        return engine.digest
    return order.digest


def _booted_into(target: Target, goal: RolloutGoal, has_failed: bool) -> str:
    """What a pod is given that is about to open its port: the first of what comes into question
    that its node holds; if it holds none, the first, and the pod waits for it.
    """
    order = target.assigned
    told = [order.digest] if order is not None else []
    wanted = [goal.target] if goal.activates else []
    # a mere pause takes nothing from a pod that has served: it keeps what it was told
    holds_back = not goal.activates and (goal.rule.gives_up or not target.pod.was_ready)
    # what it is told goes first only if it may still lead somewhere; before what is stable in any
    # case, unless the rollout holds the target back
    if _is_on_its_way(target, goal):
        candidates = [*told, *wanted, goal.stable]
    elif goal.activates:
        candidates = [*wanted, *told, goal.stable]
    elif holds_back:
        candidates = [goal.stable, *told]
    else:
        candidates = [*told, goal.stable]
    # though it was told it once; unless the rollout is on its way back to what is stable
    if holds_back and goal.target != goal.stable:
        candidates = [digest for digest in candidates if digest != goal.target]
    possible = [
        d for d in dict.fromkeys(candidates) if not _has_given_up(target, d, goal, has_failed)
    ]
    # the empty digest is what its image brings, which needs nothing from the node
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
    # a new pod, or one that was told after its last start: it loads, and is not diverted
    if target.crashes == 0:
        return not _cannot_come(target, order.digest)
    was_well = order.digest == goal.stable and not goal.is_back
    return was_well and order.prepare == goal.target and target.crashes < failures.PREPARE_CRASHES


def _has_given_up(target: Target, digest: str, goal: RolloutGoal, has_failed: bool) -> bool:
    """Whether a pod that boots is not given this version any more. What is stable is tried however
    often it fails: it served everywhere, and there is nothing behind it.
    """
    if has_failed and digest == goal.target:
        return True
    # a version refused at boot would be refused again
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
    # what the image brings always comes; without the agent's word nothing is known
    if not digest or target.state is None or not target.follows:
        return False
    # what the agent says of it goes before what can be concluded
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
    # all at once on the way back: what prepared everywhere before harms nobody
    if goal.is_back or not idle:
        return idle, []
    waits = [wait for t in idle if (wait := t.calm_seconds(now)) > 0]
    calm = [t for t in idle if not t.calm_seconds(now)]
    done = sum(totals.prepared for totals in all_totals)
    busy = sum(plan_node.busy for plan_node in node_plans.values())
    # waves double at most: as many more as have done it well
    room = max(disruption_budget.limit(spec.strategy, desired), done) - busy
    # room is negative after a smaller strategy, or when some that were done are so no more
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
    # one without the plugin would hold the gate for ever; one that boots or switches takes what it
    # is told in any case
    if engine is None or not target.connected or target.booting or engine.phase == "Committing":
        return False
    if target.serves(digest) or target.prepared(digest):
        return False
    # one that was told the target already, as a new pod is, is on its way
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
    # candidates come in the order of nodes and names, and that is how people expect them to go
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


def needs_golden(spec: WeightRolloutSpec, base: WeightRolloutStatus) -> bool:
    """Whether pods may take the target only with golden tokens for their kind of engine. Not what
    was complete before: neither the way back nor a new pod must hang on what somebody recorded.
    """
    return spec.activation.probe == "Golden" and not revision.goes_back(base)


def assignment(
    target: Target,
    digest: str,
    prepare: str,
    rollout: Rollout,
    version: str,
    base: WeightRolloutStatus,
    ended_preparing: int,
) -> PodAssignment:
    """As it goes into the node's spec; `fencing` gives it its token and the restarts from which it
    counts. Bounds of time are seconds, as the rollout's spec has them.
    """
    spec = rollout.spec
    golden = base.target.digest if needs_golden(spec, base) else ""
    return PodAssignment(
        uid=target.pod.uid,
        rollout=rollout.uid,
        revision=base.revision,
        name=target.pod.name,
        namespace=target.pod.namespace,
        digest=digest,
        version=version,
        prepare=prepare,
        golden=golden if golden in (digest, prepare) else "",
        mode=spec.activation.mode,
        drain_timeout_seconds=spec.activation.drain_timeout_seconds,
        commit_timeout_seconds=spec.activation.commit_timeout_seconds,
        memory=spec.activation.memory,
        max_pause_seconds=spec.activation.max_pause_seconds,
        ended_preparing=ended_preparing,
    )
