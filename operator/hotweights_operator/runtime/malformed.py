"""What decisions go on with when an object does not fit the schema of this release, as after a
downgrade. Pure.

To forget such an object would be a decision, and a bad one: the pods of a rollout that is gone are
set free, its versions are let go. To go on with what it said before would be another: perhaps the
very edit that cannot be read said "stop". So it stays, it is paused, and it has a resourceVersion
of the past: whatever is to be written on the strength of it is refused by the API server, its
status first of all, and without its status nothing is acted on. What it last was understood to be
still says which pods are its own and what they serve. It moves again with the next state of it that
fits, and meanwhile the metric ``hotweights_operator_malformed_objects``, /healthz and the log say
that it stands still.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from hotweights_crds.weightrollout import Target, VersionRef, WeightRolloutStatus
from hotweights_kube.resources import Body
from hotweights_operator.model.objects import Rollout, Version
from hotweights_operator.runtime import observe
from hotweights_operator.runtime.cache import Kind

NEVER = "1"
"""A resourceVersion that no object of ours can have any more: a write that is fenced by it is
refused.
"""


def last_known(kind: Kind, body: Body, old: Any) -> Any:
    """What stands for it; None: nothing was ever understood of it, and it counts as absent.

    A rollout of which this operator has seen no better state is known by its selector, its
    version's name and its status, where those fit: its pods belong to it, whatever else it wants.
    """
    metadata = body["metadata"]
    terminating = "deletionTimestamp" in metadata
    match old:
        case Rollout() if old.uid == metadata["uid"]:
            return replace(
                old, spec=old.spec.model_copy(update={"paused": True}), terminating=terminating
            )
        case Version() if old.uid == metadata["uid"]:
            return replace(old, terminating=terminating)
        case Rollout() | Version() | None:
            return _stand_in(body) if kind == "rollout" else None
        case _:
            return old


def _stand_in(body: Body) -> Rollout | None:
    spec = body.get("spec") or {}
    try:
        target = Target.from_dict(spec.get("target") or {})
        reference = VersionRef.from_dict(spec.get("versionRef") or {})
        WeightRolloutStatus.from_dict(body.get("status") or {})
    except ValidationError:
        return None
    plain = {"versionRef": reference.to_dict(), "target": target.to_dict(), "paused": True}
    return observe.rollout(
        {**body, "metadata": {**body["metadata"], "resourceVersion": NEVER}, "spec": plain}
    )
