"""Kubernetes events (events.k8s.io/v1): what people see in ``kubectl describe``.

The same thing said again within ten minutes raises the count of the event that said it, and one
object gets at most 25 different ones in that time: a fleet that fails a thousand times must not
bury the API server or the reader. Events are for people, nothing is decided by them: one that
cannot be written is logged and forgotten.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal, Protocol

from hotweights_common import timestamps
from hotweights_kube import errors
from hotweights_kube.resources import EVENTS, Body, Resource

log = logging.getLogger(__name__)

# the numbers of client-go's own recorder (tools/record/events_cache.go)
WINDOW = timedelta(minutes=10)
MAX_PER_OBJECT = 25
MAX_NOTE = 1000  # characters; the API server takes 1,024 bytes


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
        """From the object itself. Raises `KeyError` when it lacks a name or a UID."""
        metadata = body["metadata"]
        return cls(
            body["apiVersion"],
            body["kind"],
            metadata["name"],
            metadata["uid"],
            metadata.get("namespace", ""),
        )

    def to_dict(self) -> dict[str, str]:
        """As an ObjectReference of core/v1; no namespace for what has none."""
        reference = {
            "apiVersion": self.api_version,
            "kind": self.kind,
            "name": self.name,
            "uid": self.uid,
        }
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
        """Create an event, as `client.Api.create` does."""
        ...

    async def merge_patch(
        self, resource: Resource, name: str, patch: Body, *, namespace: str | None = None
    ) -> Body:
        """Raise an event's count, as `client.Api.merge_patch` does."""
        ...


@dataclass(slots=True)
class _Said:
    """What was said of one notice. The lock has whoever writes it, so that it is written as one
    event.
    """

    namespace: str
    last: datetime
    name: str = ""  # of the event; empty: it is not written
    count: int = 0
    written: int = 0  # the count that the event shows
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(slots=True)
class Recorder:
    """Writes notices as events of one controller. Each costs the same, however many were said
    before.
    """

    api: EventWriter
    controller: str  # hotweights.dev/operator
    instance: str  # the pod's name
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    # the one that was said last is last
    _said: OrderedDict[Notice, _Said] = field(default_factory=OrderedDict)
    _of_object: Counter[Reference] = field(default_factory=Counter)
    _serial: int = 0

    async def record(self, notice: Notice) -> None:
        """Say it, or count it. Raises nothing that the API server may answer."""
        now = self.now()
        self._forget_before(now - WINDOW)  # first: what is forgotten makes room
        said = self._said.get(notice)
        if said is None:
            if self._of_object[notice.regarding] >= MAX_PER_OBJECT:
                return
            self._of_object[notice.regarding] += 1
            # the API server wants the events of what has no namespace there
            said = self._said[notice] = _Said(notice.regarding.namespace or "default", now)
        said.count, said.last = said.count + 1, now
        self._said.move_to_end(notice)
        try:
            async with said.lock:
                await self._write(notice, said)
        except errors.KubeError as error:
            log.warning(
                "the event %s of %s was not written: %s",
                notice.reason,
                notice.regarding.name,
                error,
            )

    def _forget_before(self, moment: datetime) -> None:
        while self._said:
            notice, said = next(iter(self._said.items()))
            if said.last > moment:
                return
            del self._said[notice]
            self._of_object[notice.regarding] -= 1
            if not self._of_object[notice.regarding]:
                del self._of_object[notice.regarding]

    async def _write(self, notice: Notice, said: _Said) -> None:
        """Bring the event to the count, which others may have raised meanwhile and may have written
        already.
        """
        count, last = said.count, said.last
        if said.name and said.written < count:
            series = {"count": count, "lastObservedTime": timestamps.show_micros(last)}
            try:
                await self.api.merge_patch(
                    EVENTS, said.name, {"series": series}, namespace=said.namespace
                )
            except errors.NotFound:  # events do not live long
                said.name, said.count = "", said.count - count + 1
        if not said.name:
            said.name, count = await self._create(notice, said.namespace, last), 1
        said.written = count

    async def _create(self, notice: Notice, namespace: str, moment: datetime) -> str:
        self._serial += 1
        # a name has 253 characters at most; time and serial make it one of its kind
        name = f"{notice.regarding.name[:200]}.{int(moment.timestamp() * 1e6):x}.{self._serial:x}"
        await self.api.create(
            EVENTS,
            {
                "apiVersion": EVENTS.api_version,
                "kind": EVENTS.kind,
                "metadata": {"name": name, "namespace": namespace},
                "eventTime": timestamps.show_micros(moment),
                "regarding": notice.regarding.to_dict(),
                "reason": notice.reason,
                "note": notice.note[:MAX_NOTE],
                "type": notice.type,
                "action": notice.action,
                "reportingController": self.controller,
                "reportingInstance": self.instance[:128],  # more is refused
            },
        )
        return name
