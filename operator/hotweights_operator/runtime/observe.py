"""From what the API server sends to what decisions look at. Pure: a body in, a frozen value out,
`Malformed` if it is none.

Only what decisions need is kept, so that a cache of a large cluster stays small. What a pod's
engine container is, is told by the environment variable that the injection sets; where there is
none, every container counts.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import ValidationError

from hotweights_common import timestamps
from hotweights_crds.nodeweights import NodeWeightsSpec, NodeWeightsStatus
from hotweights_crds.weightrollout import WeightRolloutSpec, WeightRolloutStatus
from hotweights_crds.weightversion import WeightVersionSpec, WeightVersionStatus
from hotweights_kube.resources import Body, name_of
from hotweights_operator.model.objects import (
    GATE,
    RETRY_ANNOTATION,
    Node,
    NodeState,
    Pod,
    Rollout,
    Version,
)

SOCKET_VARIABLE = "HOTWEIGHTS_SOCKET"
ZONE_LABEL = "topology.kubernetes.io/zone"


class Malformed(Exception):
    """An object that does not fit the schema of this release."""


def rollout(body: Body) -> Rollout:
    """A WeightRollout. Raises `Malformed` when spec or status do not fit."""
    metadata = body["metadata"]
    try:
        spec = WeightRolloutSpec.from_dict(body["spec"])
        status = WeightRolloutStatus.from_dict(body.get("status") or {})
    except ValidationError as error:
        raise _malformed("WeightRollout", body, error) from error
    # the annotation is cut to what `status.retried` takes: it is compared with it
    return Rollout(
        uid=metadata["uid"],
        name=metadata["name"],
        namespace=metadata["namespace"],
        generation=metadata.get("generation", 0),
        resource_version=metadata["resourceVersion"],
        created_at=metadata.get("creationTimestamp", ""),
        spec=spec,
        status=status,
        retry=str((metadata.get("annotations") or {}).get(RETRY_ANNOTATION, ""))[:128],
        terminating="deletionTimestamp" in metadata,
    )


def version(body: Body) -> Version:
    """A WeightVersion. Raises `Malformed` when spec or status do not fit."""
    metadata = body["metadata"]
    try:
        spec = WeightVersionSpec.from_dict(body["spec"])
        status = WeightVersionStatus.from_dict(body.get("status") or {})
    except ValidationError as error:
        raise _malformed("WeightVersion", body, error) from error
    return Version(
        uid=metadata["uid"],
        name=metadata["name"],
        namespace=metadata["namespace"],
        generation=metadata.get("generation", 0),
        resource_version=metadata["resourceVersion"],
        spec=spec,
        status=status,
        terminating="deletionTimestamp" in metadata,
    )


def node_state(body: Body) -> NodeState:
    """A NodeWeights. Raises `Malformed` when spec or status do not fit."""
    metadata = body["metadata"]
    try:
        spec = NodeWeightsSpec.from_dict(body.get("spec") or {})
        status = NodeWeightsStatus.from_dict(body.get("status") or {})
    except ValidationError as error:
        raise _malformed("NodeWeights", body, error) from error
    return NodeState(
        name=metadata["name"],
        generation=metadata.get("generation", 0),
        resource_version=metadata["resourceVersion"],
        spec=spec,
        status=status,
    )


def node(body: Body) -> Node:
    metadata = body["metadata"]
    return Node(
        name=metadata["name"],
        uid=metadata["uid"],
        ready=is_ready(body),
        zone=(metadata.get("labels") or {}).get(ZONE_LABEL, ""),
    )


def pod(body: Body) -> Pod:
    """A pod with the inject label. Whatever is missing is as in a pod that was made just now."""
    metadata, spec, status = body["metadata"], body.get("spec") or {}, body.get("status") or {}
    engines = _engine_statuses(spec, status)
    ready, gate = _condition(status, "Ready") or {}, _condition(status, GATE) or {}
    ended = _last_ended(engines)
    return Pod(
        uid=metadata["uid"],
        name=metadata["name"],
        namespace=metadata["namespace"],
        node=spec.get("nodeName", ""),
        labels=dict(metadata.get("labels") or {}),
        ready=ready.get("status") == "True",
        was_ready=ready.get("status") == "True" or _was_ready(status),
        ready_since=timestamps.parse(ready.get("lastTransitionTime")),
        gate=gate.get("status") == "True",
        gate_since=timestamps.parse(gate.get("lastTransitionTime")),
        engine_started_at=_engine_started_at(engines),
        restarts=sum(container.get("restartCount", 0) for container in engines),
        last_run_seconds=_run_seconds(ended),
        oom_killed=ended.get("reason") == "OOMKilled",
        terminating="deletionTimestamp" in metadata,
        finished=status.get("phase") in ("Succeeded", "Failed"),
    )


def is_ready(body: Body) -> bool:
    """Whether the object's condition Ready is True."""
    return (_condition(body.get("status") or {}, "Ready") or {}).get("status") == "True"


def _condition(status: Body, type_: str) -> Body | None:
    found: Body | None = next(
        (c for c in status.get("conditions") or () if c.get("type") == type_), None
    )
    return found


def _was_ready(status: Body) -> bool:
    """Whether a pod that is not Ready was so before.

    The kubelet sets Ready=False when it first sees a pod, and then leaves the time alone until the
    status changes. So a pod that has never been Ready lost nothing after its containers started.
    One that restarted may have been; it counts as if.
    """
    containers = status.get("containerStatuses") or ()
    if any(container.get("restartCount", 0) for container in containers):
        return True
    lost_at = timestamps.parse((_condition(status, "Ready") or {}).get("lastTransitionTime"))
    started = [moment for container in containers if (moment := _started_at(container))]
    return bool(started) and lost_at is not None and lost_at > max(started)


def _engine_statuses(spec: Body, status: Body) -> list[Body]:
    """The statuses of the containers that run an engine; of all, where the injection's variable is
    in none.
    """
    engines = {
        container["name"]
        for container in spec.get("containers") or ()
        if any(variable.get("name") == SOCKET_VARIABLE for variable in container.get("env") or ())
    }
    return [
        s for s in status.get("containerStatuses") or () if not engines or s.get("name") in engines
    ]


def _engine_started_at(engines: list[Body]) -> datetime | None:
    """The last start among them; None while one of them does not run."""
    starts = [_started_at(container) for container in engines]
    known = [start for start in starts if start is not None]
    return max(known) if known and len(known) == len(starts) else None


def _last_ended(engines: list[Body]) -> Body:
    """How the one that ended last has ended: now, or before it was started again."""
    ends: list[Body] = [
        ended
        for container in engines
        for when in ("state", "lastState")
        if (ended := (container.get(when) or {}).get("terminated"))
    ]
    return max(ends, key=lambda ended: str(ended.get("finishedAt", "")), default={})


def _run_seconds(ended: Body) -> float | None:
    started, finished = (
        timestamps.parse(ended.get("startedAt")),
        timestamps.parse(ended.get("finishedAt")),
    )
    return max(0.0, (finished - started).total_seconds()) if started and finished else None


def _started_at(container: Body) -> datetime | None:
    running: Any = (container.get("state") or {}).get("running") or {}
    return timestamps.parse(running.get("startedAt"))


def _malformed(kind: str, body: Body, error: ValidationError) -> Malformed:
    return Malformed(
        f"{kind} {name_of(body)} does not fit this release of the operator, upgrade it or its "
        f"CRDs: {error}"
    )
