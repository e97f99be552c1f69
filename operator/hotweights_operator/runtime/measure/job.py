"""A Job whose end is the result.

Its name follows from what it measures, so that an operator which starts anew finds the one that runs
instead of making another. The rollout owns it, and it has a deadline of its own: one that nobody
waits for any more ends all the same. It is never deleted from here, which would need the right to.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from hotweights_crds.analysis import JobRun
from hotweights_crds.base import API_VERSION
from hotweights_kube import errors
from hotweights_kube.resources import JOBS, Body, Resource
from hotweights_operator.model.measurements import Measure, MeasurementId, Reading
from hotweights_operator.runtime.measure.client import NoResult

POLL_SECONDS = 5.0
GRACE_SECONDS = 30.0
"""Beyond the Job's own deadline: its controller says so in the status before."""
KEPT_SECONDS = 3600
"""How long a Job is kept when it is over, unless it says otherwise (ttlSecondsAfterFinished)."""
ALLOW = "set analysis.jobs.enabled=true in the chart, which lets the operator create Jobs"


class Writer(Protocol):
    """What is needed of the API (`hotweights_kube.Api`). Each raises `KubeError`."""

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Body: ...

    async def create(
        self, resource: Resource, body: Body, *, manager: str = "hotweights"
    ) -> Body: ...


@dataclass(frozen=True, slots=True)
class JobMeter:
    """Runs Jobs by the API server."""

    api: Writer
    poll_seconds: float = POLL_SECONDS

    async def measure(self, wanted: Measure, run: JobRun) -> Reading:
        """What became of the Job, which is made if there is none. Raises `NoResult`."""
        made = body(wanted, run)
        name = made["metadata"]["name"]
        try:
            async with asyncio.timeout(run.timeout_seconds + GRACE_SECONDS):
                await self._make(made)
                return await self._outcome(wanted, name)
        except TimeoutError as error:
            raise NoResult(f"Job {name} is not over after {run.timeout_seconds} s") from error
        except errors.Forbidden as error:
            raise NoResult(f"{error}: {ALLOW}") from error
        except errors.KubeError as error:
            raise NoResult(str(error)) from error

    async def _make(self, made: Body) -> None:
        while True:
            try:
                await self.api.create(JOBS, made, manager="hotweights-operator")
            except errors.AlreadyExists:
                return  # by a process before this one, or by a request whose answer was lost
            except errors.Unavailable:
                await asyncio.sleep(self.poll_seconds)
            else:
                return

    async def _outcome(self, wanted: Measure, name: str) -> Reading:
        while True:
            try:
                found = await self.api.get(JOBS, name, wanted.namespace)
            except errors.Unavailable:
                found = {}  # the Job goes on meanwhile
            owners = found.get("metadata", {}).get("ownerReferences") or ()
            if found and all(owner.get("uid") != wanted.id.rollout for owner in owners):
                raise NoResult(f"Job {name} belongs to somebody else: delete it")
            for condition in (found.get("status") or {}).get("conditions") or ():
                if (
                    condition.get("type") in ("Complete", "Failed")
                    and condition["status"] == "True"
                ):
                    return _reading(name, condition)
            await asyncio.sleep(self.poll_seconds)


def _reading(name: str, condition: Any) -> Reading:
    why = f": {condition.get('reason', '')}: {condition.get('message', '')}"
    is_complete = condition["type"] == "Complete"
    text = f"Job {name}{'' if is_complete else why}"
    return Reading(datetime.now(UTC), is_complete, text)


def body(wanted: Measure, run: JobRun) -> Body:
    """The Job, as it is made."""
    spec: dict[str, Any] = dict(run.spec)
    own = spec.get("activeDeadlineSeconds")
    most = run.timeout_seconds
    spec["activeDeadlineSeconds"] = min(own, most) if isinstance(own, int) else most
    spec.setdefault("backoffLimit", 0)
    spec.setdefault("ttlSecondsAfterFinished", KEPT_SECONDS)
    owner = {
        "apiVersion": API_VERSION,
        "kind": "WeightRollout",
        "name": wanted.owner,
        "uid": wanted.id.rollout,
    }
    metadata = {
        "name": name_of(wanted.owner, wanted.id),
        "namespace": wanted.namespace,
        "labels": {"hotweights.dev/analysis": wanted.id.metric},
        "ownerReferences": [owner],
    }
    return {"apiVersion": JOBS.api_version, "kind": JOBS.kind, "metadata": metadata, "spec": spec}


def name_of(owner: str, id: MeasurementId) -> str:
    """The name of a measurement's Job: for people by rollout and metric, and by a hash of all that
    it is the measurement of.
    """
    known = f"{id.rollout}/{id.revision}/{id.step}/{id.begun}/{id.metric}/{id.number}"
    digest = hashlib.sha256(known.encode()).hexdigest()[:10]
    # 63 in all, since the name becomes a label of its pods
    return f"{owner[:18].rstrip('.-')}-{id.metric}-{digest}".replace(".", "-")
