"""Events: what is new in a rollout's status, told on the rollout and on the pods concerned.

News is the difference between the status that was written and the one that will be, so nobody has
to remember what was said, and a status that could not be written is no news.
"""

from __future__ import annotations

from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_operator.decide import revision, rollback
from hotweights_operator.decide.context import PassContext
from hotweights_operator.decide.strategy import canary
from hotweights_operator.model.actions import Event, ObjectRef
from hotweights_operator.model.objects import Pod, Rollout

# the phases that somebody has to do something about
_WARNINGS = frozenset({"Stalled", "Aborted", "RolledBack"})


def rollout_events(
    rollout: Rollout, status: WeightRolloutStatus, context: PassContext
) -> tuple[Event, ...]:
    """What is new in the status, on the rollout and on the pods that failed."""
    old = rollout.status
    about = ObjectRef("WeightRollout", rollout.namespace, rollout.name, rollout.uid)
    found: list[Event] = []
    if status.revision != old.revision:
        # not a retry: that has the target of the revision before
        earlier = (version.digest for version in old.earlier)
        known = {revision.stable(old).digest, old.previous.digest, *earlier}
        known -= {"", old.target.digest}
        rollback = " (a rollback)" if status.target.digest in known else ""
        found.append(
            Event(
                about,
                "RevisionStarted",
                f"Revision {status.revision}: {status.target.version}{rollback}",
            )
        )
    found += _news(about, rollout, status)
    old_reason = next((c.reason for c in old.conditions if c.type == "Progressing"), "")
    new_reason = next((c.reason for c in status.conditions if c.type == "Progressing"), "")
    if status.phase != old.phase or new_reason != old_reason:
        warning = status.phase in _WARNINGS
        found.append(Event(about, new_reason if warning else status.phase, status.message, warning))
    told = {(failure.pod, failure.reason) for failure in old.failures}
    for failure in status.failures:
        if (failure.pod, failure.reason) in told:
            continue
        # a failure of staging has no UID (`failures`), so that pod is looked for by its name
        pod = context.observed.pods.get(failure.pod_uid) or _named(failure.pod, context)
        if pod is not None:
            on_pod = ObjectRef("Pod", pod.namespace, pod.name, pod.uid)
            found.append(Event(on_pod, failure.reason, failure.message, warning=True))
    return tuple(found)


def _news(about: ObjectRef, rollout: Rollout, status: WeightRolloutStatus) -> list[Event]:
    """What commands, canary steps and ways back have to tell."""
    old, found = rollout.status, list[Event]()
    command, back = status.last_command, status.rolled_back
    if command.text and command != old.last_command:
        refused = command.outcome == "Refused"
        text = f"{command.text}: {command.message}"
        found.append(Event(about, f"Command{command.outcome}", text, warning=refused))
    if rollback.is_on(status) and back != old.rolled_back:
        found.append(Event(about, "RollbackStarted", rollback.tell(status), warning=True))
    # what speaks against the version is told with the phase that it leads to
    verdict, is_new = status.analysis.phase, status.analysis.phase != old.analysis.phase
    if is_new and verdict in ("Successful", "Inconclusive"):
        text = f"Step {status.analysis.step + 1}: {status.analysis.message}"
        unsure = verdict == "Inconclusive"
        found.append(Event(about, f"Analysis{verdict}", text, warning=unsure))
    was = (old.revision, old.canary.step, old.canary.steps)
    now = (status.revision, status.canary.step, status.canary.steps)
    if step := canary.tell(rollout.spec, status) if now != was else "":
        found.append(Event(about, "CanaryStep", step[:1].upper() + step[1:]))
    return found


def _named(name: str, context: PassContext) -> Pod | None:
    return next(
        (t.pod for totals in context.all_totals for t in totals.targets if t.pod.name == name), None
    )
