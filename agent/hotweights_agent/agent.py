"""One agent of a cluster: a node's parts, told by the API server what to do.

Starting: the plugin, which no pod may look for in vain; what the disk remembers and the peers'
port; then the engines' socket, and last the watches. Ending is the other way round: engines first
(they go on serving), then what is being fetched, then peers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hotweights_agent import peer_endpoints
from hotweights_agent.driver import Driver
from hotweights_agent.kube.pod_status import PodStatusWriter
from hotweights_agent.kube.status_writer import StatusWriter
from hotweights_agent.kube.sync import KubeSync, patch_pod_status, patch_status
from hotweights_agent.kube.token_review import (
    EngineAuthenticator,
    PeerAuthenticator,
    TokenReviews,
    claims_of,
)
from hotweights_agent.local import plugin_folder
from hotweights_agent.metrics import Metrics
from hotweights_agent.node import Node, NodeConfig, until, utc
from hotweights_agent.session.messages import PodStatusSeen
from hotweights_agent.settings import Settings
from hotweights_agent.staging import allowed_sources
from hotweights_agent.staging.broadcasts import BroadcastContext
from hotweights_common import hosts
from hotweights_common.http_endpoints import Endpoints
from hotweights_kube import Api, Identity, review
from hotweights_transports.broadcast import Groups
from hotweights_transports.handoff import frames
from hotweights_transports.peers import base as peers
from hotweights_transports.peers.proof import ServerKey

log = logging.getLogger(__name__)


async def run(settings: Settings, version: str, stop: asyncio.Event) -> None:
    """Run an agent until ``stop`` is set. What cannot be started raises."""
    metrics = Metrics()
    plugin = plugin_folder.install(settings.plugin_folder, settings.run_folder, version)
    log.info("the plugin is at %s", plugin or "no place: the image has none")
    async with contextlib.AsyncExitStack() as stack:
        api = await stack.enter_async_context(
            await Api.connect(
                timeout_seconds=settings.kube.request_seconds,
                user_agent=f"hotweights-agent/{version}",
            )
        )
        engine_reviews = _reviews(api, frames.TOKEN_AUDIENCE, metrics)
        node = await Node.open(
            stack,
            _place(settings, version, api, metrics, engine_reviews),
            metrics,
            staging=settings.staging,
            engines=settings.engines,
            memory_bytes=settings.memory_bytes,
        )
        # before the socket opens: the first engine's effects need somebody to take them
        sync, status = _kube(api, settings, node.driver, metrics, engine_reviews)
        await node.serve(stack)
        endpoints = Endpoints(
            settings.metrics_port, metrics.registry, node.stuck, partial(_not_ready, sync, status)
        )
        stack.push_async_callback(asyncio.to_thread, endpoints.close)
        log.info("agent %s of node %s: engines at %s, peers at %s, metrics at port %d",
                 version, settings.node, node.driver.server.path, node.endpoints[0], endpoints.port)  # fmt: skip
        await until(stop, node.driver.run, sync.run)


def _place(
    settings: Settings, version: str, api: Api, metrics: Metrics, engine_reviews: TokenReviews
) -> NodeConfig:
    token = partial(_token, settings)
    host = hosts.bracketed(settings.address)
    peer = PeerAuthenticator(
        _reviews(api, peers.TOKEN_AUDIENCE, metrics),
        asyncio.get_running_loop(),
        partial(_me, token),
    )
    return NodeConfig(
        version=version,
        run_folder=settings.run_folder / settings.node,
        keeper=Path(settings.keeper_socket) if settings.keeper_socket else None,
        state_folder=settings.state_folder,
        listen=peer_endpoints.listeners(settings.ports, settings.address),
        advertise=lambda address: (
            f"{address.partition(':')[0]}://{host}:{address.rpartition(':')[2]}"
        ),
        broadcasts=BroadcastContext(settings.node, settings.address, token, peer, Groups(token))
        if settings.mpi
        else None,
        measure_endpoints=partial(peer_endpoints.describe, ports=settings.ports, mpi=settings.mpi),
        sources=allowed_sources.allowed(settings.roots),
        prove_sources=settings.prove_sources,
        peers=peer,
        peer_token=token,
        peer_key=ServerKey(),
        engines=EngineAuthenticator(engine_reviews, settings.node),
    )


def _kube(
    api: Api, settings: Settings, driver: Driver, metrics: Metrics, engine_reviews: TokenReviews
) -> tuple[KubeSync, StatusWriter]:
    driver.status = status = StatusWriter(
        patch_status(api, settings.node, settings.namespace),
        time.monotonic,
        utc,
        counted=lambda result: metrics.api_writes.labels("nodeweights", result).inc(),
    )

    async def tell_label(uid: str, label: str) -> None:
        await driver.tell(PodStatusSeen(uid, label))

    driver.pod_status = pod_status = PodStatusWriter(
        patch_pod_status(api),
        tell_label,
        time.monotonic,
        utc,
        resync_seconds=settings.kube.resync_seconds,
        counted=lambda result: metrics.api_writes.labels("pods", result).inc(),
    )
    sync = KubeSync(
        api,
        settings.node,
        settings.namespace,
        driver.tell,
        status,
        pod_status,
        away_seconds=settings.kube.away_seconds,
        namespaces=settings.kube.namespaces,
    )
    engine_reviews.expect(pod_status.is_here)
    return sync, status


def _reviews(api: Api, audience: str, metrics: Metrics) -> TokenReviews:
    async def ask(token: str) -> Identity:
        return await review(api, token, [audience])

    return TokenReviews(
        ask, time.time, counted=lambda result: metrics.reviews.labels(audience, result).inc()
    )


def _token(settings: Settings) -> str:
    try:
        return settings.peer_token_file.read_text().strip()
    except OSError as error:
        log.warning(
            "%s: %s; without it no peer lets us in, and we let none in",
            settings.peer_token_file,
            error.strerror,
        )
        return ""


def _me(token: Callable[[], str]) -> str:
    """The agents' service account, by our own token."""
    return str(claims_of(token()).get("sub", ""))


def _not_ready(sync: KubeSync, status: StatusWriter) -> str:
    return status.trouble() if sync.synced else "the API server has not answered yet"
