"""One node put together: store, session, stager, peers' servers and the engines' socket, and the
order in which they start and end.

Everything that an agent is, but for who tells it what to do. `agent` has the API server do that,
the standalone worker a coordinator; they bring the authentication and the two that tell the outside
(`Driver.status`, `Driver.pod_status`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hotweights_agent.driver import Driver
from hotweights_agent.engines.limits import Limits
from hotweights_agent.engines.socket_auth import Authenticator
from hotweights_agent.engines.socket_server import EngineServer
from hotweights_agent.local.kept_memory import KeptMemory
from hotweights_agent.local.state_file import StateFile
from hotweights_agent.metrics import Metrics
from hotweights_agent.session.messages import Now
from hotweights_agent.session.session import AgentInfo, Session
from hotweights_agent.session.timeouts import EngineTimeouts
from hotweights_agent.settings import EngineSettings, StagingSettings
from hotweights_agent.staging.broadcasts import BroadcastContext, Broadcasts
from hotweights_agent.staging.manifest_cache import ManifestCache
from hotweights_agent.staging.stager import Stager
from hotweights_agent.staging.store import Store
from hotweights_common import timestamps
from hotweights_crds.nodeweights import Endpoint
from hotweights_storage import linux
from hotweights_storage.capacity import available_nbytes
from hotweights_storage.sources.base import Sources
from hotweights_transports.broadcast import Inviting
from hotweights_transports.peers.base import Authenticate, ChunkProvider, PeerServer, ServerLimits
from hotweights_transports.peers.proof import ServerKey
from hotweights_transports.peers.registry import transport_for

log = logging.getLogger(__name__)

# a turn takes milliseconds and a tick comes four times a second: /healthz fails, and the kubelet
# starts the agent anew
STUCK_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Where a node's parts live and whom they let in."""

    version: str
    """Of this software."""
    run_folder: Path
    """Of the engines' socket."""
    state_folder: Path
    """What engines were to serve, and manifests."""
    listen: Sequence[str]
    """Where peers connect: URIs of the registry."""
    advertise: Callable[[str], str]
    """Peers' server's own address → the one to tell others."""
    sources: Sources
    """What may be read."""
    peers: Authenticate
    """Who may pull from here."""
    peer_token: Callable[[], str]
    """Who we are to peers."""
    engines: Authenticator
    """Who may connect to the socket."""
    peer_key: ServerKey | None = None
    """By which peers know us before they show their tokens; None: they are told of none."""
    lend: Callable[[Store], ChunkProvider] = lambda store: store
    """What of the store peers get to see."""
    broadcasts: BroadcastContext | None = None
    """For taking part in broadcasts; None: it does not."""
    keeper: Path | None = None
    """The socket of the process that holds what is staged while this one is gone; None: nobody."""
    measure_endpoints: Callable[[Sequence[str]], tuple[Endpoint, ...]] = lambda _endpoints: ()
    """What is told of where peers reach it; may take a while."""
    prove_sources: bool = False
    """Whether sources of new versions are read whole, manifest or not."""


class Node:
    """`Node.open` makes the parts and listens for peers; `serve` opens the socket, after whoever
    decides has told where `driver` reports to. All of it ends with the stack that it was opened in:
    engines first (they go on serving), then what is being fetched, then peers.
    """

    def __init__(
        self,
        driver: Driver,
        store: Store,
        manifests: ManifestCache,
        endpoints: tuple[str, ...],
        servers: Sequence[PeerServer] = (),
    ) -> None:
        self.driver = driver
        self.store = store
        self.manifests = manifests
        self._servers = servers
        self.endpoints = endpoints
        """Where peers reach it."""

    @classmethod
    async def open(
        cls,
        stack: contextlib.AsyncExitStack,
        config: NodeConfig,
        metrics: Metrics,
        *,
        staging: StagingSettings,
        engines: EngineSettings,
        memory_bytes: int = 0,
    ) -> Node:
        """Make the parts and listen for peers. What cannot be started raises; what was started
        before it ends with the stack.
        """
        linux.raise_descriptor_limit()  # before the first slab
        budget = Budget(memory_bytes)
        keeper = KeptMemory(config.keeper)
        stack.callback(keeper.close)
        store = Store(reserve_nbytes=staging.reserve_bytes, available=budget, keeper=keeper)
        budget.store = store
        for image in await asyncio.to_thread(keeper.find):
            await asyncio.to_thread(store.adopt, image)
        memory = StateFile(config.state_folder / "pods.json")
        memory.load()  # before anything listens: the session begins with it
        endpoints: list[str] = []
        servers: list[PeerServer] = []
        provider = config.lend(store)
        if config.broadcasts is not None:
            provider = Inviting(provider, config.broadcasts.groups)
        for uri in config.listen:
            limits = ServerLimits(
                bandwidth_bytes_per_second=staging.bandwidth_bytes_per_second or None
            )
            key = config.peer_key
            server = transport_for(uri).listen(
                uri, provider, config.peers, limits, key.prove if key else None
            )
            stack.push_async_callback(asyncio.to_thread, server.close)
            servers.append(server)
            endpoints.append(config.advertise(server.address))
            if key:
                key.serves_at(endpoints[-1])
        session = Session(
            AgentInfo(
                str(uuid.uuid4()),  # of this start
                config.version,
                endpoints[0] if endpoints else "",
                await asyncio.to_thread(config.measure_endpoints, tuple(endpoints)),
                config.peer_key.public if config.peer_key else "",
            ),
            EngineTimeouts(prepare_seconds=engines.prepare_seconds),
            reconnect_seconds=engines.reconnect_seconds,
        )
        driver = Driver(session, memory, store, metrics, now, memory_bytes=memory_bytes)
        manifests = ManifestCache(config.state_folder / "manifests")
        driver.stager = Stager(
            store,
            config.sources,
            manifests,
            driver.tell,
            token=config.peer_token,
            settings=staging,
            broadcasts=Broadcasts(config.broadcasts, staging.patience_seconds)
            if config.broadcasts
            else None,
            prove_sources=config.prove_sources,
            fetched=lambda transport, nbytes: metrics.fetched.labels(transport).inc(nbytes),
        )
        metrics.stuck_reads.set_function(lambda: driver.stager.stuck_reads)
        stack.push_async_callback(driver.stager.close)
        driver.server = EngineServer(
            config.run_folder,
            config.engines,
            driver.tell,
            agent=config.version,
            limits=Limits(hello_seconds=engines.hello_seconds),
        )
        return cls(driver, store, manifests, tuple(endpoints), servers)

    async def serve(self, stack: contextlib.AsyncExitStack) -> None:
        """Let engines in, after `Driver.status` and `Driver.pod_status` are set. Raises
        `ServerNotStarted`.
        """
        await self.driver.server.start()
        stack.push_async_callback(self.driver.server.close)

    def stuck(self) -> str:
        """Why this process is of no use any more, for /healthz; empty: it is."""
        silent = time.monotonic() - self.driver.turned_at
        if silent > STUCK_SECONDS:
            return f"nothing was decided for {silent:.0f} s"
        deaf = [server.trouble() for server in self._servers]
        return next(filter(None, [*deaf, self.driver.server.trouble()]), "")


class Budget:
    """What versions may still take: what the node and its control groups leave, and not more than
    the settings allow.
    """

    def __init__(self, most_nbytes: int) -> None:
        """0: no limit of our own."""
        self._most_nbytes = most_nbytes
        self._asking = threading.local()
        self.store: Store | None = None

    def __call__(self) -> int:
        """As `Store` wants it. The store's own account asks us, so while we read that account only
        the node counts.
        """
        available = available_nbytes()
        if self.store is None or not self._most_nbytes or getattr(self._asking, "now", False):
            return available
        # by thread: others may ask at the same time, and they are to be answered in full
        self._asking.now = True
        try:
            held = self.store.usage().held
        finally:
            self._asking.now = False
        return min(available, self._most_nbytes - held)


def utc() -> str:
    """Now, as the API writes it."""
    return timestamps.show(datetime.now(UTC))


def now() -> Now:
    """Both clocks at once, for the session: the one that only grows, and the one for people."""
    return Now(time.monotonic(), utc())


async def until(stop: asyncio.Event, *parts: Callable[[], Coroutine[None, None, None]]) -> None:
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
