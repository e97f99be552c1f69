"""Events: what is new in a rollout's status, told on the rollout and on the pods concerned.

News is the difference between the status that was written and the one that will be, so nobody has
to remember what was said, and a status that could not be written is no news.
"""

from __future__ import annotations

from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_operator.decide import revision
from hotweights_operator.decide.context import PassContext
from hotweights_operator.model.actions import Event, ObjectRef
from hotweights_operator.model.objects import Pod, Rollout

# the phases that somebody has to do something about
_WARNINGS = frozenset({"Stalled", "Aborted"})


def rollout_events(
    rollout: Rollout, status: WeightRolloutStatus, context: PassContext
) -> tuple[Event, ...]:
    """What is new in the status, on the rollout and on the pods that failed."""
    old = rollout.status
    about = ObjectRef("WeightRollout", rollout.namespace, rollout.name, rollout.uid)
    found: list[Event] = []
    if status.revision != old.revision:
        # not a retry: that has the target of the revision before
        known = {revision.stable(old).digest, old.previous.digest} - {"", old.target.digest}
        rollback = " (a rollback)" if status.target.digest in known else ""
        found.append(
            Event(
                about,
                "RevisionStarted",
                f"Revision {status.revision}: {status.target.version}{rollback}",
            )
        )
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


def _named(name: str, context: PassContext) -> Pod | None:
    return next(
        (t.pod for totals in context.all_totals for t in totals.targets if t.pod.name == name), None
    )
