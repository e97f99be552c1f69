"""Makes this node's pods show what they should: the readiness gate's condition and the two labels,
in one write each.

By level: what each pod is to show is compared with what the API server says it shows, whenever
either changes and every `resync_seconds` besides, and written until both are equal. Server-side
apply with a manager of our own touches nothing else in the pod, and a label that is not applied any
more goes. The UID is part of the write, so that a new pod of the same name is never marked for an
old one. What a pod shows is told to the session, which waits for it before it lets an engine
switch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from hotweights_agent.session.effects import PodStatus
from hotweights_agent.session.messages import Pod
from hotweights_agent.session.retry import RetryPolicy, TokenBucket
from hotweights_common.backoff import Backoff
from hotweights_kube.errors import Conflict, KubeError, NotFound
from hotweights_kube.resources import Body, newer

log = logging.getLogger(__name__)

GATE = "hotweights.dev/weights"
VERSION_LABEL = "hotweights.dev/version"
DIGEST_LABEL = "hotweights.dev/digest"
MANAGER = "hotweights-agent"
WRITES_AT_ONCE = 8  # of one agent: a thousand of them share the API server
RETRY = RetryPolicy(most=None, backoff=Backoff(0.2, 10.0))  # for as long as the pod is there
# writes to one pod in the long run: an engine that says something else each time is not worth more
PER_SECOND = 1.0
BURST = 20  # and at once; a version's switch takes two


@dataclass(slots=True)
class _Wanted:
    pod: Pod
    pod_status: PodStatus
    failures: int = 0
    again_at: float = 0.0  # seconds of the writer's clock
    writing: bool = False
    bucket: TokenBucket = field(default_factory=lambda: TokenBucket(PER_SECOND, BURST, 0.0))


def shown(body: Body) -> PodStatus | None:
    """What a pod shows at the API server; None without the gate's condition."""
    labels = body.get("metadata", {}).get("labels") or {}
    condition = condition_of(body)
    if condition is None:
        return None
    return PodStatus(
        gate=condition.get("status") == "True",
        reason=str(condition.get("reason", "")),
        message=str(condition.get("message", "")),
        version_label=str(labels.get(VERSION_LABEL, "")),
        digest_label=str(labels.get(DIGEST_LABEL, "")),
    )


def condition_of(body: Body) -> Body | None:
    """The gate's condition (KEP-580, pod readiness gates); None: no agent has written it yet."""
    conditions = body.get("status", {}).get("conditions") or []
    return next((c for c in conditions if c.get("type") == GATE), None)


def patch_for(pod: Pod, pod_status: PodStatus, present: Body | None, utc: str) -> Body:
    """The applied object. The transition time stays while the status does."""
    old = condition_of(present) if present else None
    status = "True" if pod_status.gate else "False"
    since = (
        old["lastTransitionTime"]
        if old and old.get("status") == status and old.get("lastTransitionTime")
        else utc
    )
    labels = {VERSION_LABEL: pod_status.version_label, DIGEST_LABEL: pod_status.digest_label}
    condition = {
        "type": GATE,
        "status": status,
        "reason": pod_status.reason,
        "message": pod_status.message,
        "lastTransitionTime": since,
    }
    return {
        "metadata": {
            "name": pod.name,
            "namespace": pod.namespace,
            "uid": pod.uid,
            "labels": {key: value for key, value in labels.items() if value},
        },
        "status": {"conditions": [condition]},
    }


class PodStatusWriter:
    """Takes what pods are to show by `want`, what they show by `saw`; writes in `run`."""

    def __init__(
        self,
        apply: Callable[[Body], Awaitable[Body]],
        tell_label: Callable[[str, str], Awaitable[None]],
        clock: Callable[[], float],
        utc: Callable[[], str],
        *,
        resync_seconds: float = 30.0,
        counted: Callable[[str], None] = lambda _result: None,
    ) -> None:
        """``apply`` applies to a pod's status; ``tell_label`` hears the digest label that a pod
        shows now.
        """
        self._apply = apply
        self._tell_label = tell_label
        self._clock = clock
        self._utc = utc
        self._resync_seconds = resync_seconds
        self._counted = counted
        self._wanted: dict[str, _Wanted] = {}
        self._pods: dict[str, Body] = {}
        self._labels: dict[str, str] = {}
        self._changed = asyncio.Event()
        self._writes: set[asyncio.Task[None]] = set()

    def want(self, pod: Pod, pod_status: PodStatus) -> None:
        """From now on the pod is to show this."""
        old = self._wanted.get(pod.uid) or _Wanted(pod, pod_status)
        self._wanted[pod.uid] = replace(
            old, pod=pod, pod_status=pod_status, failures=0, again_at=0.0
        )
        self._changed.set()

    def forget(self, uid: str) -> None:
        """Write nothing more to it; what it shows it goes on to show."""
        self._wanted.pop(uid, None)

    @property
    def present(self) -> frozenset[str]:
        """UIDs of the pods of this node, as far as the watch has told."""
        return frozenset(self._pods)

    def is_here(self, uid: str) -> bool:
        """Whether that pod is one of them."""
        return uid in self._pods

    async def saw(self, body: Body) -> None:
        """A pod as the API server has it."""
        uid = str(body["metadata"]["uid"])
        old = self._pods.get(uid)
        if old is not None and newer(old, body):  # the answer to our own write came sooner
            return
        self._pods[uid] = body
        label = str((body["metadata"].get("labels") or {}).get(DIGEST_LABEL, ""))
        if self._labels.get(uid, "") != label:
            self._labels[uid] = label
            await self._tell_label(uid, label)
        if uid in self._wanted:
            self._changed.set()

    def rewound(self) -> None:
        """resourceVersions went back: whatever comes next is newer than what is known."""
        for body in self._pods.values():
            body["metadata"]["resourceVersion"] = "0"

    def gone(self, uid: str) -> None:
        """The pod is deleted; nothing is kept of it, and a write under way may fail."""
        for table in (self._pods, self._labels, self._wanted):
            table.pop(uid, None)

    async def run(self) -> None:
        """Compare and write, until cancelled. Each pod's writes come one after the other."""
        try:
            while True:
                self._changed.clear()
                wait = self._start_writes()
                try:
                    async with asyncio.timeout(wait):
                        await self._changed.wait()
                except TimeoutError:
                    continue
        finally:
            for write in self._writes:
                write.cancel()

    def _start_writes(self) -> float:
        """Begin the writes that are due; gives how long until the next one can be."""
        now, wait = self._clock(), self._resync_seconds
        for uid, wanted in self._wanted.items():
            if wanted.writing or not self._differs(uid, wanted):
                continue
            pause = max(wanted.again_at - now, wanted.bucket.wait_seconds(now))
            if pause > 0:
                wait = min(wait, pause)
            elif len(self._writes) < WRITES_AT_ONCE:
                wanted.bucket.take()
                wanted.writing = True
                task = asyncio.create_task(self._write_one(uid, wanted))
                self._writes.add(task)
                task.add_done_callback(self._ended)
        # not 0: a loop that only turns would leave nobody else a turn
        return max(0.01, wait)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._writes.discard(task)
        self._changed.set()

    def _differs(self, uid: str, wanted: _Wanted) -> bool:
        present = self._pods.get(uid)
        return present is None or shown(present) != wanted.pod_status

    async def _write_one(self, uid: str, wanted: _Wanted) -> None:
        try:
            body = await self._apply(
                patch_for(wanted.pod, wanted.pod_status, self._pods.get(uid), self._utc())
            )
        except (NotFound, Conflict) as error:
            self._counted("gone")
            log.info(
                "pod %s/%s is not the one that was marked: %s",
                wanted.pod.namespace,
                wanted.pod.name,
                error,
            )
            self._put_off(uid, wanted)
        except KubeError as error:
            self._counted("failed")
            log.warning(
                "pod %s/%s was not marked: %s", wanted.pod.namespace, wanted.pod.name, error
            )
            self._put_off(uid, wanted)
        else:
            self._counted("written")
            wanted.failures = 0
            # what came back is read at once: the session waits for the label to be gone
            await self.saw(body)
        finally:
            present = self._wanted.get(uid)
            if present is not None:
                present.writing = False

    def _put_off(self, uid: str, wanted: _Wanted) -> None:
        present = self._wanted.get(uid, wanted)
        present.failures = wanted.failures + 1
        present.again_at = self._clock() + RETRY.backoff.seconds(present.failures)
