"""Events: what is new in a rollout's status, told on the rollout and on the pods concerned.

News is the difference between the status that was written and the one that will be, so nobody has to remember what was said, and
a status that could not be written is no news.
"""

from __future__ import annotations

from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_operator.decide import revision
from hotweights_operator.decide.rollout_status import View
from hotweights_operator.model.actions import About, Event
from hotweights_operator.model.objects import Pod, Rollout

_WARNINGS = frozenset({"Stalled", "Aborted"})


def events(rollout: Rollout, status: WeightRolloutStatus, view: View) -> tuple[Event, ...]:
    """What is new in the status, on the rollout and on the pods that failed."""
    old = rollout.status
    about = About("WeightRollout", rollout.namespace, rollout.name, rollout.uid)
    found: list[Event] = []
    if status.revision != old.revision:
        known = {revision.stable(old).digest, old.previous.digest} - {"", old.target.digest}
        rollback = " (a rollback)" if status.target.digest in known else ""
        found.append(Event(about, "RevisionStarted", f"Revision {status.revision}: {status.target.version}{rollback}"))
    old_reason = next((c.reason for c in old.conditions if c.type == "Progressing"), "")
    new_reason = next((c.reason for c in status.conditions if c.type == "Progressing"), "")
    if status.phase != old.phase or new_reason != old_reason:
        warning = status.phase in _WARNINGS
        found.append(Event(about, new_reason if warning else status.phase, status.message, warning))
    told = {(failure.pod, failure.reason) for failure in old.failures}
    for failure in status.failures:
        if (failure.pod, failure.reason) in told:
            continue
        pod = view.observed.pods.get(failure.pod_uid) or _named(failure.pod, view)
        if pod is not None:
            on_pod = About("Pod", pod.namespace, pod.name, pod.uid)
            found.append(Event(on_pod, failure.reason, failure.message, warning=True))
    return tuple(found)


def _named(name: str, view: View) -> Pod | None:
    return next((t.pod for share in view.shares for t in share.targets if t.pod.name == name), None)
