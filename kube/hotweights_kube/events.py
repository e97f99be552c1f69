"""Kubernetes events (events.k8s.io/v1): what people see in ``kubectl describe``.

The same thing said again within ten minutes raises the count of the event that said it, and one object gets at most 25 different
ones in that time: a fleet that fails a thousand times must not bury the API server or the reader. Events are for people, nothing
is decided by them: one that cannot be written is logged and forgotten.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal, Protocol

from hotweights_kube import errors
from hotweights_kube.resources import EVENTS, Body, Resource

log = logging.getLogger(__name__)

WINDOW = timedelta(minutes=10)
MAX_PER_OBJECT = 25
MAX_NOTE = 1000


@dataclass(frozen=True, slots=True)
class Reference:
    """The object that an event is about."""

    api_version: str
    kind: str
    name: str
    uid: str
    namespace: str = ""

    @classmethod
    def of(cls, body: Body) -> Reference:
        """From the object itself."""
        metadata = body["metadata"]
        return cls(body["apiVersion"], body["kind"], metadata["name"], metadata["uid"], metadata.get("namespace", ""))

    def to_dict(self) -> dict[str, str]:
        """As an ObjectReference."""
        reference = {"apiVersion": self.api_version, "kind": self.kind, "name": self.name, "uid": self.uid}
        return {**reference, "namespace": self.namespace} if self.namespace else reference


@dataclass(frozen=True, slots=True)
class Notice:
    """One thing to say about an object."""

    regarding: Reference
    reason: str  # one short CamelCase word
    note: str
    type: Literal["Normal", "Warning"] = "Normal"
    action: str = "Rollout"


class EventWriter(Protocol):
    """What the recorder needs of the API."""

    async def create(self, resource: Resource, body: Body, *, manager: str = "hotweights") -> Body:
        """Create an event."""
        ...

    async def merge_patch(self, resource: Resource, name: str, patch: Body, *, namespace: str | None = None) -> Body:
        """Raise an event's count."""
        ...


@dataclass(slots=True)
class _Said:
    name: str
    namespace: str
    count: int
    last: datetime


@dataclass(slots=True)
class Recorder:
    """Writes notices as events of one controller."""

    api: EventWriter
    controller: str  # hotweights.dev/operator
    instance: str  # the pod's name
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    _said: dict[Notice, _Said] = field(default_factory=dict)

    async def record(self, notice: Notice) -> None:
        """Say it, or count it. Raises nothing that the API server may answer."""
        now = self.now()
        self._said = {key: said for key, said in self._said.items() if now - said.last < WINDOW}
        said = self._said.get(notice)
        try:
            if said is not None and await self._count(said, now):
                return
            if sum(1 for key in self._said if key.regarding == notice.regarding) < MAX_PER_OBJECT:
                await self._create(notice, now)
        except errors.KubeError as error:
            log.warning("the event %s of %s was not written: %s", notice.reason, notice.regarding.name, error)

    async def _count(self, said: _Said, now: datetime) -> bool:
        """Raise the count of an event that was written; False if it is gone."""
        said.count += 1
        said.last = now
        series = {"count": said.count, "lastObservedTime": micro_time(now)}
        try:
            await self.api.merge_patch(EVENTS, said.name, {"series": series}, namespace=said.namespace)
        except errors.NotFound:
            return False
        return True

    async def _create(self, notice: Notice, now: datetime) -> None:
        namespace = notice.regarding.namespace or "default"
        name = f"{notice.regarding.name[:200]}.{int(now.timestamp() * 1e6):x}.{len(self._said):x}"
        await self.api.create(
            EVENTS,
            {
                "apiVersion": EVENTS.api_version,
                "kind": EVENTS.kind,
                "metadata": {"name": name, "namespace": namespace},
                "eventTime": micro_time(now),
                "regarding": notice.regarding.to_dict(),
                "reason": notice.reason,
                "note": notice.note[:MAX_NOTE],
                "type": notice.type,
                "action": notice.action,
                "reportingController": self.controller,
                "reportingInstance": self.instance[:128],
            },
        )
        self._said[notice] = _Said(name, namespace, 1, now)


def micro_time(moment: datetime) -> str:
    """RFC 3339 with microseconds, as events have it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
