"""``decide(rollout, observed, now)``: the one next step of a rollout, from what is observed and
from nothing else.

It is pure: no clock, no API, no memory. What cannot be seen in the fleet (the revision, what is
stable, who failed, whether the revision was given up, how far it had come) stands in the status,
which is written before anything of the same pass is acted on (`loop`). Everything a pass does may
be lost or done twice; the next pass sees what is there and goes on. The order: which revision,
which pods, what they say, may the rollout act (`blocked`), what each pod is to serve, what to
report.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from hotweights_crds.conditions import find
from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_operator.decide import (
    activation,
    assignments,
    events,
    progress_deadline,
    revision,
    rollout_status,
)
from hotweights_operator.decide.activation import NodePlan, RolloutGoal
from hotweights_operator.decide.blocked import Blocked
from hotweights_operator.decide.context import PassContext
from hotweights_operator.decide.versions import is_failure
from hotweights_operator.model import failures
from hotweights_operator.model.actions import RolloutDecision
from hotweights_operator.model.failures import Failures
from hotweights_operator.model.node_totals import NodeTotals, TotalsQuery
from hotweights_operator.model.objects import Pod, Rollout, Version
from hotweights_operator.model.observed import Observed
from hotweights_operator.model.selectors import selects


def decide(
    rollout: Rollout, observed: Observed, now: datetime, started_at: datetime | None = None
) -> RolloutDecision:
    """One step; `loop` calls it for a rollout's key, one at a time. ``started_at``: since when this
    process decides; a deadline never passes on another process's clock. None: it always did.
    """
    version = observed.version_index.named(rollout.namespace, rollout.spec.version_ref.name)
    # an edit of what is being deleted begins no revision
    usable = version is not None and version.usable and not rollout.terminating
    base = revision.revised(rollout, version, now) if version and usable else rollout.status
    query = TotalsQuery(
        digest=base.target.digest,
        revision=base.revision,
        is_back=revision.goes_back(base),
        previous=base.previous.digest,
        min_ready_seconds=rollout.spec.min_ready_seconds,
        needs_golden=activation.needs_golden(rollout.spec, base),
    )
    # interned, here and below: totals and plans are remembered by the identity of what was asked
    query = observed.intern("question", rollout.uid, query)
    all_totals = [
        observed.node_totals(rollout.uid, node, query) for node in observed.nodes_of(rollout.uid)
    ]
    found = _failures(base, all_totals, observed)
    # before the hold is looked for: what failed in this pass counts in this pass, and stays counted
    base = base.model_copy(update={"most_failed": max(base.most_failed, len(found.failed))})
    blocked = _hold(rollout, base, version, observed, bool(all_totals))
    goal = RolloutGoal(
        rollout=rollout.uid,
        revision=base.revision,
        target=base.target.digest,
        stable=revision.stable(base).digest,
        is_back=query.is_back,
        rule=blocked.rule,
        passed=base.revision > 0 and base.prepared_revision == base.revision,
    )
    goal = observed.intern("goal", rollout.uid, goal)
    node_plans = {
        totals.node: _plan_node(rollout, totals, goal, found, observed) for totals in all_totals
    }
    plan = activation.plan_activation(rollout.spec, goal, all_totals, node_plans, now)
    # not under a hold nor without pods: then nobody has shown that all can prepare
    if plan.passes and goal.activates and all_totals:
        base = base.model_copy(update={"prepared_revision": base.revision})
    context = PassContext(
        rollout,
        base,
        query,
        tuple(all_totals),
        found,
        blocked,
        version,
        observed,
        plan.restarted,
        started_at,
    )
    status = rollout_status.build(context, now)
    actions = assignments.writes(rollout, base, plan, observed, stages=blocked.rule.activates)
    waits = (
        plan.again_in_seconds,
        progress_deadline.deadline_in_seconds(context, status, now),
        rollout_status.settles_in_seconds(context, status, now),
    )
    return RolloutDecision(
        actions=tuple(actions),
        status=status,
        events=events.rollout_events(rollout, status, context),
        again_in_seconds=min((wait for wait in waits if wait is not None), default=None),
    )


def _failures(
    base: WeightRolloutStatus, all_totals: Sequence[NodeTotals], observed: Observed
) -> Failures:
    """All pods that do not follow: those of the nodes, and those that failed earlier in this
    revision, as the status remembers.
    """
    failed = {
        uid: failure
        for totals in all_totals
        if totals.failed
        for uid, failure in totals.failed.items()
    }
    missing = {
        uid: failure
        for totals in all_totals
        if totals.missing
        for uid, failure in totals.missing.items()
    }
    # an engine that starts again forgets; one that serves the target at last has not failed
    for uid, failure in failures.remembered(base.failures).items():
        pod = observed.pods.get(uid)
        if (
            pod is not None
            and pod.live
            and uid not in failed
            and not observed.target(uid).serves(base.target.digest)
        ):
            failed[uid] = failure
            missing.pop(uid, None)
    return Failures(failed, missing)


def _plan_node(
    rollout: Rollout, totals: NodeTotals, goal: RolloutGoal, found: Failures, observed: Observed
) -> NodePlan:
    """What is planned for one node; what that is remembered, if nothing that it was made from has
    changed.
    """
    failed = (
        frozenset(t.pod.uid for t in totals.targets if t.pod.uid in found.failed)
        if found.failed
        else frozenset()
    )
    known = observed.remembered.setdefault(totals.node, {})
    then: tuple[NodeTotals, RolloutGoal, frozenset[str], NodePlan] | None = known.get(
        ("plan", rollout.uid)
    )
    if then is None or then[0] is not totals or then[1] is not goal or then[2] != failed:
        then = (totals, goal, failed, activation.plan_node(totals, goal, failed))
        known["plan", rollout.uid] = then
    return then[3]


def _hold(
    rollout: Rollout,
    base: WeightRolloutStatus,
    version: Version | None,
    observed: Observed,
    has_targets: bool,
) -> Blocked:
    """Why the rollout may not act, if it may not; the gravest reason first."""
    # whose pods these are goes before which version, and that before how it goes; a pause last, as
    # what was given up must stay so under it
    if rollout.terminating:
        return Blocked("Terminating", "it is being deleted; its pods keep what they serve")
    if clash := conflicts(rollout, observed):
        pod, owner = clash[0]
        return Blocked(
            "TargetConflict",
            f"{len(clash)} selected pods, {pod.name} among them, belong to the older WeightRollout "
            f"{owner.name}: change one of the two selectors or delete one of the two",
        )
    if version is None:
        name = rollout.spec.version_ref.name
        return Blocked(
            "NotFound",
            f"WeightVersion {name} does not exist in namespace {rollout.namespace}: create it",
        )
    if not version.usable:
        resolved = find(version.status.conditions, "Resolved")
        reason = resolved.reason if resolved else "Resolving"
        message = resolved.message if resolved else "it is being resolved"
        text = f"WeightVersion {version.name}: {message}"
        return Blocked("VersionFailed" if is_failure(reason) else "Resolving", text, reason)
    # for as long as the revision lasts, though what failed may be seen no more
    if base.revision and base.aborted_revision == base.revision:
        return Blocked("Aborted")
    # not once it was complete: a pod that dies later speaks against nothing
    policy = rollout.spec.failure_policy
    if base.most_failed > policy.max_failed and not revision.is_completed(base):
        return Blocked("Aborted" if policy.action == "Abort" else "TooManyFailures")
    if rollout.spec.paused:
        return Blocked("Paused")
    return Blocked("" if has_targets else "NoTargets")


def conflicts(rollout: Rollout, observed: Observed) -> list[tuple[Pod, Rollout]]:
    """Pods that the rollout selects and an older one owns; empty: there is no conflict. The oldest
    rollout owns a pod (`pod_owners`), so the younger one holds still.
    """
    older = []
    # the oldest come first; what is behind this one cannot own what it selects
    for other in observed.owners.rollouts_in(rollout.namespace):
        if other.uid == rollout.uid:
            break
        older.append(other)
    if not older:  # nearly always; the pods of a large namespace need not be looked at
        return []
    found = []
    for pod in observed.owners.pods_in(rollout.namespace):
        owner = observed.owners.owner(pod.uid)
        if (
            pod.live
            and owner is not None
            and owner.uid != rollout.uid
            and selects(rollout.spec.target.selector, pod.labels)
        ):
            found.append((pod, owner))
    return found
