"""One worker put together from its settings: a node's parts, told by a coordinator what to do, and
the order in which they start and end.

Its run folder is its own: two workers of one host that shared a socket would take engines from each
other, so the second one is refused, or, where nobody named a folder, gets another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from hotweights.worker import events
from hotweights.worker.allowed_sources import sources
from hotweights.worker.auth import (
    PEER_VARIABLE,
    TOKEN_FILE,
    LocalEngineAuthenticator,
    PeerSecret,
    engine_token,
    peer_secret,
)
from hotweights.worker.no_pod_status import NullPodStatus
from hotweights.worker.peer_provider import LocalChunks
from hotweights.worker.peers import PeerSelection
from hotweights.worker.sync import CoordinatorSync, HeartbeatTiming
from hotweights_agent.engines.socket_server import ServerNotStarted
from hotweights_agent.metrics import Metrics
from hotweights_agent.node import Node, NodeConfig, until
from hotweights_agent.settings import EngineSettings, StagingSettings
from hotweights_common import hosts, locks
from hotweights_common.errors import HotweightsError
from hotweights_common.http_endpoints import Endpoints
from hotweights_common.reasons import Reason
from hotweights_coordinator.client.client import AsyncClient
from hotweights_coordinator.client.participation import Participation
from hotweights_coordinator.wire import address
from hotweights_transports.peers.registry import transport_for, transports

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 5.0  # all workers hear of a version within a heartbeat


class WorkerError(HotweightsError):
    """The worker cannot start: a folder, an address or a setting is not usable; the message names
    the option.
    """

    reason = Reason.WORKER_NOT_STARTED


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """How one worker runs. Ports 0 mean any free one; sizes are in bytes."""

    endpoints: str
    """Addresses of the coordinators, with commas between them."""
    roots: tuple[Path, ...] = ()
    """Folders that plans may name; none: the current one."""
    worker_id: str = ""
    """What the coordinator calls it; empty: host and pid."""
    listen: str = "tcp://127.0.0.1:0"
    """Where peers connect, ``tcp://address:port``."""
    advertise: str = ""
    """The host name or address by which they reach us; empty: what ``listen`` says."""
    transport: str = "auto"
    """How peers talk: auto, tcp or ucx."""
    zone: str = ""
    """The neighbourhood; empty: the host's /24."""
    folder: Path = Path()
    """Socket, token, manifests and what engines were to serve."""
    folder_is_named: bool = True
    """False: another folder will do where this one is another worker's."""
    token: str = ""
    """For the coordinator; peers' secret follows from it."""
    curve: Path | None = None
    events_endpoint: str = ""
    """Where the coordinator publishes its events; empty: each coordinator's next port."""
    metrics_port: int = 9099
    """Where metrics are read; 0: any port. One that is taken counts as 0."""
    memory_bytes: int = 0
    """What versions may take; 0: what the host leaves."""
    staging: StagingSettings = field(
        default_factory=lambda: StagingSettings(patience_seconds=PATIENCE_SECONDS)
    )
    engines: EngineSettings = field(default_factory=EngineSettings)
    timing: HeartbeatTiming = field(default_factory=HeartbeatTiming)


@dataclass(frozen=True, slots=True)
class Running:
    """A worker that takes part, for those who wait for it."""

    worker_id: str
    socket: Path
    token_file: Path
    endpoints: tuple[str, ...]
    metrics_port: int


async def run(
    settings: WorkerSettings,
    version: str,
    stop: asyncio.Event,
    *,
    once: bool = False,
    started: Callable[[Running], None] = lambda _running: None,
) -> None:
    """Run a worker until ``stop``, or with ``once`` until it has applied a version. ``started`` is
    called on this event loop once engines and peers can connect. Raises `WorkerError` where it
    cannot start, and `CoordinatorError` when no coordinator takes it in.
    """
    worker_id = settings.worker_id or f"{socket.gethostname()}-{os.getpid()}"
    door = PeerSecret(peer_secret(settings.token))
    listen = _listen(settings, door)
    schemes = [urlsplit(uri).scheme for uri in listen]
    advertise = _advertised(settings)
    metrics = Metrics()
    lending = LocalChunks()
    async with contextlib.AsyncExitStack() as stack:
        # before the socket and the token in it: its lock says that they are ours
        folder = _own_folder(stack, settings, worker_id)
        allowed = sources(settings.roots)
        place = NodeConfig(
            version=version,
            run_folder=folder,
            state_folder=folder,
            listen=listen,
            advertise=partial(_with_host, advertise),
            sources=allowed,
            peers=door,
            peer_token=door.token,
            engines=LocalEngineAuthenticator(engine_token(folder)),
            lend=lending.lend,
        )
        try:
            node = await Node.open(
                stack,
                place,
                metrics,
                staging=settings.staging,
                engines=settings.engines,
                memory_bytes=settings.memory_bytes,
            )
        except OSError as error:
            raise WorkerError(
                f"cannot listen for peers at {settings.listen}: {error.strerror}; name "
                "another --listen"
            ) from error
        client = AsyncClient(
            settings.endpoints, settings.token, settings.curve, settings.timing.call_seconds
        )
        stack.push_async_callback(client.close)
        done = asyncio.Event()
        sync = CoordinatorSync(
            client,
            Participation(
                worker_id,
                socket.gethostname(),
                # a new process: what an earlier one precommitted does not count for it
                instance=uuid.uuid4().hex,
                zone=settings.zone,
                endpoints=node.endpoints,
            ),
            node,
            allowed,
            PeerSelection(worker_id, advertise, settings.zone, schemes),
            lending,
            timing=settings.timing,
            once=done if once else None,
        )
        # before it serves: the first engine's first word has to reach somebody
        node.driver.status = sync
        node.driver.pod_status = NullPodStatus(node.driver.tell)
        try:
            await node.serve(stack)
        except ServerNotStarted as error:
            raise WorkerError(f"{error} (--socket-folder)") from error
        web = _metrics(settings, metrics, node, sync)
        stack.push_async_callback(asyncio.to_thread, web.close)
        log.info("worker %s: engines at %s, peers at %s, metrics at port %d",
                 worker_id, node.driver.server.path, ", ".join(node.endpoints), web.port)  # fmt: skip
        started(
            Running(
                worker_id, node.driver.server.path, folder / TOKEN_FILE, node.endpoints, web.port
            )
        )
        heard = [
            partial(events.listen, endpoint, settings.token, settings.curve, sync.hurry)
            for endpoint in _event_endpoints(settings)
        ]
        await _until_either(stop, done, [node.driver.run, sync.run, *heard])


async def _until_either(
    stop: asyncio.Event,
    done: asyncio.Event,
    parts: Sequence[Callable[[], Coroutine[None, None, None]]],
) -> None:
    over = asyncio.Event()

    async def watch(event: asyncio.Event) -> None:
        await event.wait()
        over.set()

    watching = [asyncio.create_task(watch(event)) for event in (stop, done)]
    try:
        await until(over, *parts)
    finally:
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)


def _own_folder(stack: contextlib.AsyncExitStack, settings: WorkerSettings, worker_id: str) -> Path:
    """The run folder, locked as long as this worker lives."""
    folders = [settings.folder]
    if not settings.folder_is_named:
        folders.append(settings.folder.with_name(f"{settings.folder.name}-{worker_id}"))
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        try:
            stack.enter_context(locks.held(folder / "lock"))
        except locks.Busy:
            log.info("%s is another worker's", folder)
            continue
        return folder
    raise WorkerError(
        f"{folders[-1]} is another worker's; give each worker of a host its own --socket-folder"
    )


def _listen(settings: WorkerSettings, door: PeerSecret) -> list[str]:
    """Where peers are let in, the preferred transport first. Raises `WorkerError`."""
    parts = urlsplit(settings.listen)
    between = [scheme for scheme, one in transports().items() if one.between_hosts]
    try:
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if parts.scheme not in between or not host or port is None:
        raise WorkerError(
            f"{settings.listen}: not where peers can connect; write --listen "
            "tcp://address:port (0: any port)"
        )
    if not door.protected and not hosts.is_loopback(host):
        text = (
            f"{settings.listen} can be reached from other hosts; set ${PEER_VARIABLE} (or the "
            "coordinator's token)"
        )
        raise WorkerError(f"{text}, or listen at tcp://127.0.0.1:0", Reason.UNPROTECTED)
    if not hosts.is_loopback(host):
        log.warning(
            "%s: peers are shown an HMAC of the secret in clear, and weights are not encrypted; "
            "encrypt the network where that matters (docs/coordinator.md)",
            settings.listen,
        )
    wanted = between if settings.transport == "auto" else [settings.transport]
    # TCP is always there, whatever of the others does not work here.
    wanted = list(dict.fromkeys([*wanted, "tcp"]))
    schemes = [scheme for scheme in wanted if _works(scheme)]
    shown = hosts.bracketed(host)
    return [
        f"{scheme}://{shown}:{port + index if port else 0}" for index, scheme in enumerate(schemes)
    ]


def _works(scheme: str) -> bool:
    try:
        transport_for(f"{scheme}://")
    except ValueError as error:
        log.warning("%s", error)
        return False
    return True


def _advertised(settings: WorkerSettings) -> str:
    """The host that others are told."""
    host = urlsplit(settings.listen).hostname or ""
    if settings.advertise or not hosts.is_wildcard(host):
        return settings.advertise or host
    where = address.parse(address.split(settings.endpoints)[0])
    with socket.socket(
        socket.AF_INET6 if ":" in where.bare_host else socket.AF_INET, socket.SOCK_DGRAM
    ) as probe:
        try:
            # sends nothing; says which of our addresses leads there
            probe.connect((where.bare_host, where.port))
        except OSError as error:
            text = (
                f"none of this host's addresses leads to {where}: {error.strerror or error}; "
                "name one with --advertise"
            )
            raise WorkerError(text) from error
        found: str = probe.getsockname()[0]
        return found


def _with_host(host: str, uri: str) -> str:
    parts = urlsplit(uri)
    return f"{parts.scheme}://{hosts.bracketed(host)}:{parts.port}"


def _event_endpoints(settings: WorkerSettings) -> list[str]:
    if settings.events_endpoint:
        return [settings.events_endpoint]
    return [address.events_endpoint(endpoint) for endpoint in address.split(settings.endpoints)]


def _metrics(
    settings: WorkerSettings, metrics: Metrics, node: Node, sync: CoordinatorSync
) -> Endpoints:
    """They can be read from other hosts where peers come from other hosts."""
    host = "127.0.0.1" if hosts.is_loopback(urlsplit(settings.listen).hostname or "") else ""

    def ready() -> str:
        return "" if sync.synced else "no coordinator has answered yet"

    try:
        return Endpoints(settings.metrics_port, metrics.registry, node.stuck, ready, host=host)
    except OSError as error:
        log.warning(
            "metrics are not at port %d (%s) but at another", settings.metrics_port, error.strerror
        )
        return Endpoints(0, metrics.registry, node.stuck, ready, host=host)
