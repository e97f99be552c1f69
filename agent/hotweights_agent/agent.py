"""One agent put together from its settings: the parts, who tells whom, and the order in which they start and end.

Starting: what the disk remembers, then the peers' port, the socket and the plugin, then the API. Ending: engines first (they go
on serving), then peers, then what is being fetched.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from functools import partial

from hotweights_agent import origins, plugin_folder
from hotweights_agent.auth import EngineAuthenticator, PeerAuthenticator, Reviews, claims_of
from hotweights_agent.driver import Driver
from hotweights_agent.engine_server import EngineServer, Limits
from hotweights_agent.kube_sync import KubeSync, apply_marks, patch_status
from hotweights_agent.manifests import ManifestCache
from hotweights_agent.memory import Memory
from hotweights_agent.messages import Marked, Now
from hotweights_agent.metrics import Endpoints, Metrics
from hotweights_agent.pod_marks import PodMarks
from hotweights_agent.session import Self, Session
from hotweights_agent.settings import Settings
from hotweights_agent.staging import Stager
from hotweights_agent.status_writer import StatusWriter
from hotweights_agent.steering import Bounds
from hotweights_agent.store import Store
from hotweights_kube import Api, Identity, review
from hotweights_transports.capacity import available_nbytes
from hotweights_transports.handoff import wire
from hotweights_transports.peers import base as peers
from hotweights_transports.peers.registry import transport_for

log = logging.getLogger(__name__)

STUCK_SECONDS = 30.0


def utc() -> str:
    """Now, as the API writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def now() -> Now:
    """Now, for the session."""
    return Now(time.monotonic(), utc())


async def run(settings: Settings, version: str, stop: asyncio.Event) -> None:
    """Run an agent until ``stop`` is set. What cannot be started raises."""
    metrics = Metrics()
    budget = Budget(settings.memory_bytes)
    store = Store(
        reserve_nbytes=settings.staging.reserve_bytes,
        stagings_at_once=settings.staging.at_once,
        available=budget,
    )
    budget.store = store
    memory = Memory(settings.state_folder / "pods.json")
    memory.load()
    plugin = plugin_folder.install(settings.plugin_folder, settings.run_folder, version)
    log.info("the plugin is at %s", plugin or "no place: the image has none")
    async with contextlib.AsyncExitStack() as stack:
        api = await stack.enter_async_context(
            await Api.connect(timeout_seconds=settings.kube.request_seconds, user_agent=f"hotweights-agent/{version}")
        )
        token = partial(_token, settings)
        peer_server = transport_for("tcp://").listen(
            f"tcp://0.0.0.0:{settings.peer_port}",
            store,
            PeerAuthenticator(
                _reviews(api, peers.TOKEN_AUDIENCE, metrics), asyncio.get_running_loop(), partial(_me, token)
            ),
        )
        stack.push_async_callback(asyncio.to_thread, peer_server.close)
        endpoint = f"tcp://{_bracketed(settings.address)}:{peer_server.address.rpartition(':')[2]}"
        session = Session(
            Self(str(uuid.uuid4()), version, endpoint),
            Bounds(prepare_seconds=settings.engines.prepare_seconds),
            reconnect_seconds=settings.engines.reconnect_seconds,
        )
        driver = Driver(session, memory, store, metrics, now, memory_bytes=settings.memory_bytes)
        driver.stager = Stager(
            store,
            origins.allowed(settings.roots),
            ManifestCache(settings.state_folder / "manifests"),
            driver.tell,
            token=token,
            settings=settings.staging,
            fetched=lambda transport, nbytes: metrics.fetched.labels(transport).inc(nbytes),
        )
        stack.push_async_callback(driver.stager.close)
        sync = _kube(api, settings, driver, metrics)
        driver.server = EngineServer(
            settings.run_folder / settings.node,
            EngineAuthenticator(_reviews(api, wire.TOKEN_AUDIENCE, metrics), settings.node),
            driver.tell,
            agent=version,
            limits=Limits(hello_seconds=settings.engines.hello_seconds),
        )
        await driver.server.start()
        stack.push_async_callback(driver.server.close)
        endpoints = Endpoints(
            settings.metrics_port, metrics.registry, partial(_stuck, driver), partial(_not_ready, sync)
        )
        stack.push_async_callback(asyncio.to_thread, endpoints.close)
        log.info("agent %s of node %s: engines at %s, peers at %s, metrics at port %d",
                 version, settings.node, driver.server.path, endpoint, endpoints.port)  # fmt: skip
        await _until(stop, driver.run, sync.run)


async def _until(stop: asyncio.Event, *parts: Callable[[], Coroutine[None, None, None]]) -> None:
    """Run the parts until ``stop``; a part that ends before is an error, and ends all."""
    tasks: list[asyncio.Task[None]] = [asyncio.create_task(part()) for part in parts]
    waiting = asyncio.create_task(_wait_for(stop))
    try:
        await asyncio.wait([*tasks, waiting], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in (*tasks, waiting):
            task.cancel()
        await asyncio.gather(*tasks, waiting, return_exceptions=True)


async def _wait_for(stop: asyncio.Event) -> None:
    await stop.wait()


def _kube(api: Api, settings: Settings, driver: Driver, metrics: Metrics) -> KubeSync:
    driver.status = StatusWriter(
        patch_status(api, settings.node, settings.namespace),
        time.monotonic,
        utc,
        counted=lambda result: metrics.api_writes.labels("nodeweights", result).inc(),
    )

    async def tell_label(uid: str, label: str) -> None:
        await driver.tell(Marked(uid, label))

    driver.marks = PodMarks(
        apply_marks(api),
        tell_label,
        time.monotonic,
        utc,
        resync_seconds=settings.kube.resync_seconds,
        counted=lambda result: metrics.api_writes.labels("pods", result).inc(),
    )
    return KubeSync(
        api,
        settings.node,
        settings.namespace,
        driver.tell,
        driver.status,
        driver.marks,
        away_seconds=settings.kube.away_seconds,
    )


def _reviews(api: Api, audience: str, metrics: Metrics) -> Reviews:
    async def ask(token: str) -> Identity:
        return await review(api, token, [audience])

    return Reviews(ask, time.time, counted=lambda result: metrics.reviews.labels(audience, result).inc())


def _token(settings: Settings) -> str:
    try:
        return settings.peer_token_file.read_text().strip()
    except OSError as error:
        log.warning(
            "%s: %s; without it no peer lets us in, and we let none in", settings.peer_token_file, error.strerror
        )
        return ""


def _me(token: Callable[[], str]) -> str:
    """The agents' service account, by our own token."""
    return str(claims_of(token()).get("sub", ""))


class Budget:
    """What versions may still take: what the node and its control groups leave, and not more than the settings allow."""

    def __init__(self, most_nbytes: int) -> None:
        """0: no limit of our own."""
        self._most_nbytes = most_nbytes
        self._asking = threading.local()
        self.store: Store | None = None

    def __call__(self) -> int:
        """As `Store` wants it. The store's own account asks us, so while we read that account only the node counts."""
        available = available_nbytes()
        if self.store is None or not self._most_nbytes or getattr(self._asking, "now", False):
            return available
        self._asking.now = True
        try:
            held = self.store.usage().held
        finally:
            self._asking.now = False
        return min(available, self._most_nbytes - held)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _stuck(driver: Driver) -> str:
    silent = time.monotonic() - driver.turned_at
    return f"nothing was decided for {silent:.0f} s" if silent > STUCK_SECONDS else ""


def _not_ready(sync: KubeSync) -> str:
    return "" if sync.synced else "the API server has not answered yet"
