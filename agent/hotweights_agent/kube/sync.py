"""Between this node and the API server: its own NodeWeights in and out, its own pods in.

Two watches, both narrowed by the API server to this node's objects, become messages; the status
goes out through `status_writer`, pods through `pod_status`. When the API server does not answer for
a while the session is told, and told again what holds as soon as it answers. It decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

from pydantic import ValidationError

from hotweights_agent.kube.pod_status import MANAGER, PodStatusWriter
from hotweights_agent.kube.status_writer import StatusWriter
from hotweights_agent.session.messages import ApiUnavailable, Assigned, Message, PodsPresent
from hotweights_common.backoff import Backoff
from hotweights_crds.nodeweights import NodeWeightsSpec
from hotweights_kube import (
    NODE_WEIGHTS,
    PODS,
    Api,
    Body,
    KubeError,
    NotFound,
    Selection,
    WatchTiming,
    watch,
)
from hotweights_kube.resources import newer

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0  # while it is away; one small request
# quicker than a watch's usual pace: engines that start wait for the first word
WATCH_TIMING = WatchTiming(backoff=Backoff(0.25, 4.0))


class KubeSync:
    """The watches of one agent, and the question whether the API server answers at all."""

    def __init__(
        self,
        api: Api,
        node: str,
        namespace: str,
        tell: Callable[[Message], Awaitable[None]],
        status: StatusWriter,
        pod_status: PodStatusWriter,
        *,
        away_seconds: float = 3.0,
        namespaces: Sequence[str] = (),
    ) -> None:
        """``namespaces``: where the node's pods are looked for; none: everywhere."""
        self._api = api
        self._node = node
        self._namespace = namespace
        self._tell = tell
        self._status = status
        self._pod_status = pod_status
        self._away_seconds = away_seconds
        self._places: tuple[str | None, ...] = tuple(namespaces) or (None,)
        self._unlisted = set(self._places)
        self._trouble = asyncio.Event()
        self._last: Body | None = None
        self.synced = False

    async def run(self) -> None:
        """Watch and write, until cancelled. A part that breaks ends all of them."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch_own(), name="watch NodeWeights")
            for place in self._places:
                tasks.create_task(self._watch_pods(place), name=f"watch pods {place or ''}")
            tasks.create_task(self._mind_absence(), name="api server")
            tasks.create_task(self._status.run(), name="status")
            tasks.create_task(self._pod_status.run(), name="pod status")

    async def _watch_own(self) -> None:
        selection = Selection(
            namespace=self._namespace, field_selector=f"metadata.name={self._node}"
        )
        stream = watch(
            self._api, NODE_WEIGHTS, selection, timing=WATCH_TIMING, on_trouble=self._note_trouble
        )
        async with aclosing(stream):
            async for change in stream:
                if change.type == "SYNCED":
                    self.synced = True
                elif change.type == "REWOUND":
                    self._last = None
                elif change.type == "DELETED":
                    log.warning(
                        "NodeWeights %s was deleted; what it said last goes on to hold", self._node
                    )
                    self._last = None
                else:
                    await self._take(change.body)

    async def _take(self, body: Body) -> None:
        """The node's object as it is now."""
        # it was asked for meanwhile, and the watch lags behind
        if self._last is not None and newer(self._last, body):
            return
        fresh = self._last is None or self._last["metadata"].get("uid") != body["metadata"].get(
            "uid"
        )
        same = not fresh and self._last is not None and self._last.get("spec") == body.get("spec")
        self._last = body
        if same and not self._trouble.is_set():
            return  # our own status write came back
        try:
            spec = NodeWeightsSpec.from_dict(body.get("spec") or {})
        except ValidationError as error:
            log.error(
                "NodeWeights %s cannot be understood and is not followed: %s", self._node, error
            )
            return
        await self._tell(Assigned(spec, int(body["metadata"].get("generation", 0))))
        if fresh:
            self._status.again()

    async def _watch_pods(self, namespace: str | None) -> None:
        selection = Selection(namespace, field_selector=f"spec.nodeName={self._node}")
        stream = watch(
            self._api, PODS, selection, timing=WATCH_TIMING, on_trouble=self._note_trouble
        )
        async with aclosing(stream):
            async for change in stream:
                if change.type == "SYNCED":
                    self._unlisted.discard(namespace)
                    await self._tell_present()
                elif change.type == "REWOUND":
                    self._pod_status.rewound()
                elif change.type == "DELETED":
                    self._pod_status.gone(str(change.body["metadata"]["uid"]))
                    await self._tell_present()
                else:
                    await self._pod_status.saw(change.body)

    async def _tell_present(self) -> None:
        # before the last namespace was listed, its pods would seem to be gone
        if not self._unlisted:
            await self._tell(PodsPresent(self._pod_status.present))

    def _note_trouble(self, error: KubeError) -> None:
        if not self._trouble.is_set():
            log.warning("%s", error)
        self._trouble.set()

    async def _mind_absence(self) -> None:
        """After trouble: ask until there is an answer; say so if that takes long."""
        while True:
            await self._trouble.wait()
            since, told = asyncio.get_running_loop().time(), False
            while True:
                try:
                    body = await self._api.get(NODE_WEIGHTS, self._node, self._namespace)
                except NotFound:
                    break
                except KubeError:
                    if not told and asyncio.get_running_loop().time() - since >= self._away_seconds:
                        told = True
                        await self._tell(ApiUnavailable())
                    await asyncio.sleep(POLL_SECONDS)
                    continue
                await self._take(body)
                break
            self._trouble.clear()
            self._status.again()


def patch_pod_status(api: Api) -> Callable[[Body], Awaitable[Body]]:
    """How `PodStatusWriter` writes: server-side apply under a manager of our own, so that labels
    that are not applied any more go, and nothing else in the pod is touched.
    """

    async def apply(body: Body) -> Body:
        return await api.apply(PODS, body, manager=MANAGER, subresource="status")

    return apply


def patch_status(
    api: Api, node: str, namespace: str
) -> Callable[[dict[str, object]], Awaitable[object]]:
    """How `StatusWriter` writes: a merge patch, which replaces each list as a whole. Not fenced:
    this agent is the only one who writes it.
    """

    async def patch(body: dict[str, object]) -> object:
        return await api.merge_patch(
            NODE_WEIGHTS, node, body, namespace=namespace, subresource="status", manager=MANAGER
        )

    return patch
