"""A way back that the spec does not know of: begun by a command, the failure policy, an analysis or
the deadline.

``status.rolledBack`` remembers it, and is all that there is to it: while it holds, the rollout's
version is ``rolledBack.to``, and `revision` begins a revision that leads there, as if the spec named
it. The spec stays as it is, since it belongs to Git, whose tools would set back whatever we wrote; so
what is served is not what is wanted, and the rollout says so for as long (Stalled, RolledBack). It
ends when the spec names another version than the one that was left, or with a retry of that one.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from hotweights_common import timestamps
from hotweights_crds.weightrollout import RolledBack, VersionStatus, WeightRolloutStatus
from hotweights_operator.decide import revision
from hotweights_operator.model.objects import Rollout

By = Literal["Command", "FailurePolicy", "Analysis", "Deadline"]


def is_on(status: WeightRolloutStatus) -> bool:
    """Whether the pods are led, or were, to another version than the spec names."""
    return bool(status.rolled_back.by)


def current(rollout: Rollout, status: WeightRolloutStatus) -> WeightRolloutStatus:
    """The status without a way back that holds no longer. `rollouts` calls it in every pass, before
    it asks which version is to be served.
    """
    left = status.rolled_back.from_
    if is_on(status) and (rollout.spec.version_ref.name != left or revision.is_retried(rollout)):
        return ended(status)
    return status


def ended(status: WeightRolloutStatus) -> WeightRolloutStatus:
    """The status that follows the spec again."""
    return status.model_copy(update={"rolled_back": RolledBack()})


def behind(status: WeightRolloutStatus) -> VersionStatus | None:
    """What the rollout goes back to by itself; None: nowhere. Not from what was complete, which a
    pod that fails later does not speak against; and not from a way back, or two versions that both
    fail would take turns for ever.
    """
    found = revision.stable(status)
    if is_on(status) or revision.is_completed(status) or revision.goes_back(status):
        return None
    return found if found.digest not in ("", status.target.digest) else None


def begun(
    rollout: Rollout,
    status: WeightRolloutStatus,
    to: VersionStatus,
    by: By,
    reason: str,
    message: str,
    now: datetime,
) -> WeightRolloutStatus:
    """The status from which the next pass leads all pods to ``to``. ``reason`` is one CamelCase word,
    ``message`` says why; both are cut to what the schema takes.
    """
    found = RolledBack(
        from_=rollout.spec.version_ref.name,
        to=to,
        by=by,
        reason=reason[:64],
        message=message[:512],
        at=timestamps.show(now),
    )
    return status.model_copy(update={"rolled_back": found})


def automatic(
    rollout: Rollout,
    status: WeightRolloutStatus,
    by: By,
    reason: str,
    message: str,
    now: datetime,
) -> WeightRolloutStatus:
    """The status with a way back to what was complete last; the same one if there is nothing to go
    back to (`behind`), and then the caller holds the rollout in another way.
    """
    to = behind(status)
    return begun(rollout, status, to, by, reason, message, now) if to is not None else status


def tell(status: WeightRolloutStatus) -> str:
    """For people: from where to where, who began it, and why."""
    found = status.rolled_back
    return (
        f"rolled back from {found.from_} to {found.to.version} by {found.by}: "
        f"{found.reason}: {found.message}"
    )
