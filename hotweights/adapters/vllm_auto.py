"""New weights for every vLLM engine that this process constructs: `install_autobind`, called before
the first of them.

    from hotweights.adapters.vllm_auto import install_autobind

    install_autobind(name_map=None, endpoint="tcp://127.0.0.1:5555")
    llm = LLM(...)              # or AsyncLLM, or vllm's API server in this process

Each engine then follows the coordinator as a worker does: it prepares the version of an open
attempt beside the one that it serves, says so, and once that is committed it switches inside a
pause (copy, probe, resume), by the plugin's own protocol. A version is *applied* when the engine
has answered the probe with it; until then, and when anything goes wrong before the pause, the old
one is served.

With ``HOTWEIGHTS_USE_IPC_AGENT=1`` versions come from this host's `hotweights worker` through its
socket (``HOTWEIGHTS_SOCKET``) instead of being staged in this process: one copy for all engines of
the host.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from hotweights.adapters.inprocess.names import NameMap
from hotweights.home import home
from hotweights_coordinator.wire.address import DEFAULT_ENDPOINT

if TYPE_CHECKING:
    from hotweights.adapters.inprocess.binder import AgentSocket, Binder, HostAgent

logger = logging.getLogger("vllm.hotweights.auto")
AGENT_VARIABLE = "HOTWEIGHTS_USE_IPC_AGENT"
_installed: tuple[object, ...] | None = None


def install_autobind(
    name_map: NameMap = None,
    endpoint: str = DEFAULT_ENDPOINT,
    use_mpi: bool = False,
    pinned: bool = True,
    verify: bool = True,
    device: str = "cuda",
    poll_interval: float = 2.0,
    roots: Iterable[str | os.PathLike[str]] | None = None,
    worker_id: str | None = None,
    token: str | None = None,
) -> bool:
    """Whether engines will be bound; if not, the log says why. A second call changes nothing.

    ``name_map``: checkpoint names by the version's names. ``poll_interval``: seconds between two
    questions to the coordinator when nothing is heard from it. ``roots``: folders that sources may
    lie in. ``use_mpi``, ``pinned``, ``verify`` and ``device`` are taken for compatibility: every
    chunk is verified, every switch is probed, and engines write to the devices that they run on.
    """
    global _installed
    roots = None if roots is None else tuple(map(Path, roots))
    asked = (name_map, endpoint, roots, worker_id)
    if _installed is not None:
        if _installed != asked:
            logger.warning("install_autobind was called before with other arguments; those stay")
        return True
    if use_mpi or not verify:
        logger.info(
            "use_mpi and verify=False change nothing here: versions come from peers or their "
            "source, verified"
        )
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        logger.warning(
            "No engine will be bound: vLLM cannot be imported (%s); install it, or use "
            "HotweightsWorkerExtension",
            error,
        )
        return False
    from hotweights.adapters.inprocess.binder import already_served
    from hotweights.adapters.vllm import plugin

    problem = plugin.unsupported() or already_served() or _agent_problem(name_map)
    if problem:
        logger.error("No engine will be bound: %s", problem)
        return False
    binder = _binder(name_map, endpoint, poll_interval, roots, worker_id, token)
    binder.install()
    _installed = asked
    logger.info("Engines of this process follow the coordinator at %s", endpoint)
    return True


def _agent_problem(name_map: NameMap) -> str:
    if os.environ.get(AGENT_VARIABLE, "") not in ("1", "true"):
        return ""
    if name_map is not None:
        return (
            f"with {AGENT_VARIABLE} versions come as the host's worker hands them over: name_map "
            "cannot be used"
        )
    host = _host_agent()
    if not host.token_file.is_file():
        return (
            f"{AGENT_VARIABLE} is set, and no worker has left its token at {host.token_file}: "
            "start `hotweights worker`"
        )
    return ""


def _host_agent() -> HostAgent:
    from hotweights.adapters.inprocess.binder import HostAgent
    from hotweights.worker.auth import TOKEN_FILE
    from hotweights_agent.engines.socket_server import SOCKET_NAME

    named = os.environ.get("HOTWEIGHTS_SOCKET", "")
    socket = Path(named) if named else home() / "worker" / SOCKET_NAME
    return HostAgent(socket, socket.with_name(TOKEN_FILE))


def _binder(
    name_map: NameMap,
    endpoint: str,
    poll_interval: float,
    roots: Iterable[Path] | None,
    worker_id: str | None,
    token: str | None,
) -> Binder:
    from hotweights.adapters.inprocess.binder import Binder

    if os.environ.get(AGENT_VARIABLE, "") in ("1", "true"):
        host = _host_agent()
        return Binder(lambda _folder, _loop: host)

    def open_room(folder: Path, loop: asyncio.AbstractEventLoop) -> AgentSocket:
        from hotweights.adapters.inprocess.embedded_node import EmbeddedNode, EmbeddedNodeSettings
        from hotweights.adapters.inprocess.peer_sources import allowed_roots

        secret = os.environ.get("HOTWEIGHTS_COORD_TOKEN", "") if token is None else token
        return EmbeddedNode(
            folder,
            loop,
            EmbeddedNodeSettings(
                endpoint, name_map, allowed_roots(roots), worker_id or "", secret, poll_interval
            ),
        )

    return Binder(open_room)
