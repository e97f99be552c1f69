"""A node of this process's own: what `hotweights worker` is for a host, for the engines that this
process constructed, and nobody else.

The same parts (store, session, stager, engines' socket, the conversation with the coordinator) on
the binder's loop. It takes part in what the coordinator decides only while engines are there, and
is ready only when as many of them are connected as were constructed: an engine that is starting or
lost holds the commit up, instead of being passed over. It lends nothing to peers and opens no port.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hotweights.adapters.inprocess import names
from hotweights.adapters.inprocess.errors import NotApplied
from hotweights.adapters.inprocess.names import NameMap
from hotweights.adapters.inprocess.renaming import RenamingServer
from hotweights.adapters.vllm import PLUGIN_VERSION
from hotweights.worker import events
from hotweights.worker.allowed_sources import sources
from hotweights.worker.assignments import WorkerStatus
from hotweights.worker.auth import LocalEngineAuthenticator, PeerSecret, engine_token, peer_secret
from hotweights.worker.no_pod_status import NullPodStatus
from hotweights.worker.peer_provider import LocalChunks
from hotweights.worker.peers import PeerSelection
from hotweights.worker.sync import CoordinatorSync, HeartbeatTiming
from hotweights_agent.engines.socket_server import SOCKET_NAME
from hotweights_agent.metrics import Metrics
from hotweights_agent.node import Node, NodeConfig, until
from hotweights_agent.settings import EngineSettings, StagingSettings
from hotweights_common.reasons import Reason
from hotweights_coordinator.client.client import AsyncClient
from hotweights_coordinator.client.participation import Participation
from hotweights_coordinator.wire import address
from hotweights_coordinator.wire.messages import CoordinatorError
from hotweights_crds.nodeweights import NodeWeightsStatus
from hotweights_planner import plan as plans
from hotweights_planner.manifest import Manifest

logger = logging.getLogger("vllm.hotweights.embedded_node")
OPEN_SECONDS = 30.0  # the caller's constructor waits for it
AGAIN_SECONDS = 10.0  # between two conversations with a coordinator that let none begin
PATIENCE_SECONDS = 5.0  # all workers hear of a version within a heartbeat
CALL_SECONDS = 3.0
SLOWEST_BEAT_SECONDS = 4.0  # a worker that is not heard from for 15 s is not counted any more


@dataclass(frozen=True, slots=True)
class EmbeddedNodeSettings:
    """What `install_autobind` was asked for; there is what each of them means."""

    endpoint: str
    name_map: NameMap = None
    roots: tuple[Path, ...] = ()
    worker_id: str = ""
    token: str = ""
    beat_seconds: float = 2.0
    """Between two heartbeats; used from 0.1 to `SLOWEST_BEAT_SECONDS`."""


class EmbeddedNode:
    """Open from its construction to the end of the process; every public method may be called from
    any thread.
    """

    def __init__(
        self, folder: Path, loop: asyncio.AbstractEventLoop, settings: EmbeddedNodeSettings
    ) -> None:
        """Raises what keeps the socket from being opened. Waits for the loop, so not to be called
        on it.
        """
        self._settings = settings
        self._loop = loop
        self._folder = folder / "run"
        self._folder.mkdir(mode=0o700)
        self._token = engine_token(self._folder)
        self.socket = self._folder / SOCKET_NAME
        self._expected = 0
        self._changed, self._over = asyncio.Event(), asyncio.Event()
        self._relay = _StatusRelay()
        opened: Future[None] = Future()
        self._life = asyncio.run_coroutine_threadsafe(self._live(opened), loop)
        opened.result(OPEN_SECONDS)

    def close(self) -> None:
        """Engines go on serving; nobody tells them anything any more."""
        self._life.cancel()
        wait([self._life], OPEN_SECONDS)
        asyncio.run_coroutine_threadsafe(self._over.wait(), self._loop).result(OPEN_SECONDS)

    def token(self) -> str:
        """The secret that lets engines in (`engine_token`)."""
        return self._token

    def wait_until_connected(self, engines: int) -> None:
        """So many engines of this process are there now."""
        self._loop.call_soon_threadsafe(self._expect, engines)

    def _expect(self, engines: int) -> None:
        self._expected = engines
        self._changed.set()

    async def _live(self, opened: Future[None]) -> None:
        """Until it is closed, or the end of the process."""
        try:
            async with contextlib.AsyncExitStack() as stack:
                node = await self._open(stack)
                opened.set_result(None)
                await until(asyncio.Event(), node.driver.run, partial(self._take_part_always, node))
        # engines go on serving, and the coordinator does not hear from this worker any more
        except Exception as error:
            # at the end executors refuse work before this thread has ended: no error to anybody
            if not threading.main_thread().is_alive():
                logger.debug("The process ends: %s", error)
            elif opened.done():
                logger.exception(
                    "The binder has ended: engines serve what they have and take no new versions"
                )
            else:
                opened.set_exception(error)
        finally:
            self._over.set()

    async def _open(self, stack: contextlib.AsyncExitStack) -> Node:
        place = NodeConfig(
            version=PLUGIN_VERSION,
            run_folder=self._folder,
            state_folder=self._folder,
            listen=(),
            advertise=str,
            sources=sources(self._settings.roots),
            peers=PeerSecret(""),
            peer_token=PeerSecret(peer_secret(self._settings.token)).token,
            engines=LocalEngineAuthenticator(self._token),
        )
        staging = StagingSettings(patience_seconds=PATIENCE_SECONDS)
        node = await Node.open(stack, place, Metrics(), staging=staging, engines=EngineSettings())
        if self._settings.name_map is not None:
            called = partial(self._called, node)
            node.driver.server = RenamingServer(
                place.run_folder,
                place.engines,
                node.driver.tell,
                agent=PLUGIN_VERSION,
                called=called,
            )
        node.driver.status, node.driver.pod_status = self._relay, NullPodStatus(node.driver.tell)
        await node.serve(stack)
        return node

    async def _take_part_always(self, node: Node) -> None:
        """Take part while there are engines, and not otherwise: who serves nothing would hold
        commits up, or make them look complete.
        """
        while True:
            self._changed.clear()  # before the look: what changes afterwards wakes it again
            if self._expected:
                taking_part = asyncio.create_task(self._take_part(node))
                try:
                    while self._expected:
                        self._changed.clear()
                        await self._changed.wait()
                finally:
                    taking_part.cancel()
                    await asyncio.gather(taking_part, return_exceptions=True)
            else:
                await self._changed.wait()

    async def _take_part(self, node: Node) -> None:
        """As a worker, again and again: what stands against it is logged each time."""
        while True:
            try:
                await self._converse(node)
            except CoordinatorError as error:
                logger.error(
                    "%s; engines serve what they have; trying again in %.0f s", error, AGAIN_SECONDS
                )
            await asyncio.sleep(AGAIN_SECONDS)

    async def _converse(self, node: Node) -> None:
        settings = self._settings
        worker_id = settings.worker_id or f"vllm-{socket.gethostname()[:64]}-{os.getpid()}"
        async with AsyncClient(
            settings.endpoint, settings.token or None, timeout_seconds=CALL_SECONDS
        ) as client:
            sync = CoordinatorSync(
                client,
                Participation(worker_id, socket.gethostname(), instance=uuid.uuid4().hex),
                node,
                sources(settings.roots),
                PeerSelection(worker_id, "127.0.0.1", "", ("tcp",)),
                LocalChunks(),
                timing=HeartbeatTiming(
                    beat_seconds=min(max(settings.beat_seconds, 0.1), SLOWEST_BEAT_SECONDS)
                ),
                adjusted=self._unless_one_is_missing,
                refused=partial(self._refused, node),
            )
            self._relay.to(sync)
            try:
                heard = [
                    address.events_endpoint(endpoint)
                    for endpoint in address.split(settings.endpoint)
                ]
                token = settings.token or None
                parts = [
                    partial(events.listen, endpoint, token, None, sync.hurry) for endpoint in heard
                ]
                await until(asyncio.Event(), sync.run, *parts)
            finally:
                self._relay.to(None)

    def _unless_one_is_missing(self, status: WorkerStatus) -> WorkerStatus:
        """Not ready, and nothing applied, while an engine is missing."""
        if status.engines >= self._expected > 0:
            return status
        return dataclasses.replace(status, ready=False, applied=False)

    # --- the model's names ---------------------------------------------------------------------

    def _called(self, node: Node, digest: str) -> dict[str, str]:
        """What a version's tensors are called in these engines. Raises `NotApplied`."""
        manifest = node.manifests.get(digest)
        if manifest is None:
            raise NotApplied(Reason.NO_MANIFEST, f"the manifest of {digest} is not here any more")
        return _names(self._settings.name_map, manifest)

    def _refused(self, node: Node, digest: str) -> tuple[str, str] | None:
        if self._settings.name_map is None:
            return None
        try:
            self._called(node, digest)
        except Exception as error:  # noqa: BLE001 - whatever the caller's function raises
            return getattr(error, "reason", Reason.BAD_NAME_MAP), f"{type(error).__name__}: {error}"
        return None


class _StatusRelay:
    """The session's reporter: to whoever is in conversation now, who is told at once what was
    reported last.
    """

    def __init__(self) -> None:
        self._last: NodeWeightsStatus | None = None
        self._sync: CoordinatorSync | None = None

    def to(self, sync: CoordinatorSync | None) -> None:
        """Report to this one from now on; None: nobody is in conversation."""
        self._sync = sync
        if sync is not None and self._last is not None:
            sync.offer(self._last, urgent=True)

    def offer(self, status: NodeWeightsStatus, *, urgent: bool) -> None:
        """What the session says, kept for the next conversation too."""
        self._last = status
        if self._sync is not None:
            self._sync.offer(status, urgent=urgent)


def _names(name_map: NameMap, manifest: Manifest) -> dict[str, str]:
    listed: Sequence[dict[str, object]] = [
        {"name": tensor.name, "dtype": tensor.dtype, "shape": tensor.shape}
        for tensor in manifest.tensors
    ]
    return names.renamed(
        name_map, lambda: plans.build(manifest, None, "file:///").document(), listed
    )
