"""What every pod is to serve, and to prepare, now.

Engines prepare in waves, so that a version whose preparing does harm harms few. Before the first pod changes, every pod that can
must have prepared: what does not fit is refused while everything serves on. That gate is passed once in a revision; from then on
each pod waits for itself only. Then the budget decides how many change at once.

What every other pod has, it keeps, with three exceptions, looked for in every pass and under every hold: a pod that boots is given
what the rollout wants now, or what is stable while it holds; a pod that gave up what it is told, or is told what nobody wants any
more, is told what it serves; and one that broke in the middle of a switch is given what is stable to repair itself with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from hotweights_crds.nodeweights import PodAssignment
from hotweights_crds.weightrollout import WeightRolloutSpec
from hotweights_operator import budget, failures
from hotweights_operator.failures import Failures
from hotweights_operator.holds import Rule
from hotweights_operator.model import SETTLED_PHASES, STILL_SERVING_PHASES
from hotweights_operator.targets import Target


@dataclass(frozen=True, slots=True)
class Course:
    """What the rollout is at."""

    revision: int
    target: str  # digest
    stable: str  # digest of what was complete last; empty: what the engines booted
    rule: Rule
    passed: bool  # everybody who could had prepared at some time of this revision
    knows_all: (
        bool  # a step to what is stable: it needs neither waves nor the gate, because it served everywhere before
    )

    @property
    def activates(self) -> bool:
        """Whether pods may change to the target, and new ones boot into it."""
        return self.rule.activates and bool(self.target)


@dataclass(frozen=True, slots=True)
class Choice:
    """What every pod is to serve and to prepare, and which of them are told to change just now."""

    digests: Mapping[str, str]  # pod UID → digest; pods about which nothing is known are left out
    prepares: Mapping[str, str]
    activated: frozenset[str]
    passes: bool  # the gate is passed, in this pass or an earlier one
    again_in_seconds: float | None  # when pods that are of service will have been so for long enough


def choose(
    spec: WeightRolloutSpec, course: Course, targets: Sequence[Target], found: Failures, now: datetime
) -> Choice:
    """Decide for all pods."""
    failed = found.failed
    digests: dict[str, str] = {}
    for target in targets:
        digest = _kept(target, course, target.pod.uid in failed)
        if digest is not None:
            digests[target.pod.uid] = digest
    passes = course.passed or course.knows_all
    again: float | None = None
    activated: list[Target] = []
    if course.activates:
        passes = passes or not any(_is_waited_for(t, course.target, failed) for t in targets)
        if passes:
            activated, again = _activate(spec, course, targets, failed, digests, now)
    digests.update({target.pod.uid: course.target for target in activated})
    preparing = _prepare(spec, course, targets, failed, digests)
    prepares = dict.fromkeys(preparing, course.target)
    return Choice(digests, prepares, frozenset(t.pod.uid for t in activated), passes, again)


# -- what a pod keeps, or is given because it has nothing ----------------------------------------------------------------


def _kept(target: Target, course: Course, has_failed: bool) -> str | None:
    """None while that cannot be known."""
    engine, order = target.engine, target.assigned
    if target.booting:
        return _booted_into(target, course, has_failed)
    if order is None:
        if engine is not None and engine.phase in SETTLED_PHASES:
            return engine.digest
        return None
    if engine is None:
        return order.digest
    if engine.phase == "Dirty":
        return course.stable if has_failed or order.digest not in (course.target, course.stable) else order.digest
    given_up = target.gave_up_its_order or (has_failed and order.digest == course.target)
    unwanted = order.digest not in (course.target, target.proved) or _cannot_come(target, order.digest)
    if target.outstanding and (given_up or unwanted) and engine.phase in STILL_SERVING_PHASES:
        return engine.digest
    return order.digest


def _booted_into(target: Target, course: Course, has_failed: bool) -> str:
    """What a pod is given that is about to open its port: the first of what comes into question that its node holds."""
    order = target.assigned
    told = [order.digest] if order is not None else []
    if order is not None and _is_on_its_way(target, course):
        candidates = [*told, course.target, course.stable]
    elif course.activates:
        candidates = [course.target, *told, course.stable]
    elif course.rule.gives_up or not target.pod.was_ready:
        candidates = [course.stable, *told]
    else:
        candidates = [*told, course.stable]
    if not course.activates and course.target != course.stable and (course.rule.gives_up or not target.pod.was_ready):
        candidates = [digest for digest in candidates if digest != course.target]
    possible = [d for d in dict.fromkeys(candidates) if not _has_given_up(target, d, course, has_failed)]
    here = (d for d in possible if not d or (target.state is not None and target.state.holds(d)))
    return next(here, next(iter(possible), course.stable))


def _is_on_its_way(target: Target, course: Course) -> bool:
    """Whether a pod goes on with what it is told: it was told so in this revision and has not started again since; or it started
    again when it was to prepare the target, which would then be the first thing it meets."""
    order, engine = target.assigned, target.engine
    if order is None or order.revision != course.revision:
        return False
    if course.rule.gives_up and order.digest == course.target:
        return False
    if order.digest == course.stable and not target.pod.was_ready and course.activates and engine is None:
        return False
    if target.crashes == 0:
        return not _cannot_come(target, order.digest)
    return order.prepare == course.target and target.crashes < failures.PREPARE_CRASHES


def _has_given_up(target: Target, digest: str, course: Course, has_failed: bool) -> bool:
    if has_failed and digest == course.target:
        return True
    told = target.assigned
    if target.gave_up_its_order and told is not None and digest == told.digest:
        return True
    return bool(digest) and digest != course.stable and _cannot_come(target, digest)


def _cannot_come(target: Target, digest: str) -> bool:
    """Whether a version is not to be had on the pod's node: staging it failed, or it is told so and nobody knows its source."""
    if not digest or target.state is None or not target.follows:
        return False
    staged = target.state.staged(digest)
    if staged is not None:
        return staged.phase == "Failed"
    return target.told == digest and digest not in target.state.listed


# -- who prepares ------------------------------------------------------------------------------------------------------


def _prepare(
    spec: WeightRolloutSpec,
    course: Course,
    targets: Sequence[Target],
    failed: Mapping[str, object],
    digests: Mapping[str, str],
) -> set[str]:
    """UIDs of the pods that are to have the target at hand."""
    digest = course.target
    if not digest or course.rule.prepares == "None":
        return set()
    able = [t for t in targets if t.pod.uid in digests and digests[t.pod.uid] != digest and t.pod.uid not in failed]
    ready = {t.pod.uid for t in able if t.prepared(digest)}
    if course.rule.prepares == "Prepared":
        return ready
    asked = [t for t in able if t.pod.uid not in ready and _is_asked(t, digest)]
    others = [t for t in able if t.pod.uid not in ready and not _is_asked(t, digest) and not _is_in_a_loop(t)]
    if course.knows_all:
        room = len(others)
    else:
        done = len(ready) + sum(1 for t in targets if t.serves(digest))
        busy = sum(1 for t in asked if t.connected)
        room = max(budget.limit(spec.strategy, len(targets)), done) - busy
    return ready | {t.pod.uid for t in asked} | {t.pod.uid for t in others[: max(0, room)]}


def _is_asked(target: Target, digest: str) -> bool:
    return target.assigned is not None and target.assigned.prepare == digest


def _is_in_a_loop(target: Target) -> bool:
    """Whether it ends so soon that it would be blamed on what it prepares. It takes the target when it boots."""
    return target.crashes >= failures.PREPARE_CRASHES and not target.available


# -- who changes -------------------------------------------------------------------------------------------------------


def _is_waited_for(target: Target, digest: str, failed: Mapping[str, object]) -> bool:
    """Whether nobody may change before this pod has prepared (or refused)."""
    engine = target.engine
    if engine is None or not target.connected or target.booting or engine.phase == "Committing":
        return False
    if target.pod.uid in failed or target.serves(digest) or target.prepared(digest) or _is_in_a_loop(target):
        return False
    return target.assigned is None or target.assigned.digest != digest


def _activate(
    spec: WeightRolloutSpec,
    course: Course,
    targets: Sequence[Target],
    failed: Mapping[str, object],
    digests: Mapping[str, str],
    now: datetime,
) -> tuple[list[Target], float | None]:
    """The pods that change now; and when more may, though nothing happens."""
    candidates = [t for t in targets if t.pod.uid not in failed and _can_change(t, course.target, digests)]
    if not candidates:
        return [], None
    counts = budget.tally(targets, spec.min_ready_seconds, now)
    candidates.sort(key=lambda t: (t.available, t.pod.node, t.pod.name, t.pod.uid))
    chosen = budget.choose(candidates, counts, spec.strategy, len(targets), spec.min_ready_seconds, now)
    return chosen, counts.again_in_seconds if len(chosen) < len(candidates) else None


def _can_change(target: Target, digest: str, digests: Mapping[str, str]) -> bool:
    """Whether this pod could change at once."""
    return (
        target.assigned is not None
        and target.assigned.digest != digest
        and digests.get(target.pod.uid) != digest
        and target.prepared(digest)
        and target.state is not None
        and target.state.holds(digest)
    )


def assignment(
    target: Target, digest: str, prepare: str, spec: WeightRolloutSpec, version: str, revision: int
) -> PodAssignment:
    """As it goes into the node's spec; `tokens` gives it its token."""
    return PodAssignment(
        uid=target.pod.uid,
        revision=revision,
        name=target.pod.name,
        namespace=target.pod.namespace,
        digest=digest,
        version=version,
        prepare=prepare,
        mode=spec.activation.mode,
        drain_timeout_seconds=spec.activation.drain_timeout_seconds,
        commit_timeout_seconds=spec.activation.commit_timeout_seconds,
    )
