"""Binds the engines that this process constructs: each gets its name, its token and, once it is
there, its `Server`.

Nothing of it happens before the first engine is constructed, because vLLM's own child processes
import the caller's main module again. Then the environment is set by which the plugin in the
engine's ranks finds its node: the host's worker, or a node of this process's own (`embedded_node`).
Names of engines are told apart by the token (``<token>:<name>``). An engine that cannot be bound
says why in the log and serves what it booted.
"""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import logging
import os
import shutil
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import wraps
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hotweights.adapters.inprocess.metrics import BinderMetrics
from hotweights.adapters.vllm import ENDPOINT_PLUGIN, GENERAL_PLUGIN, bundle, plugin, settings
from hotweights.adapters.vllm.suitability import unsuitable

logger = logging.getLogger("vllm.hotweights.binder")
# longer than the binding's own limit for the gate (`binding`), so that its error is the one heard
JOIN_SECONDS = 150.0
T = TypeVar("T")


class AgentSocket(Protocol):
    """Where engines of this process connect to."""

    @property
    def socket(self) -> Path:
        """The path of the agent's unix socket."""

    def token(self) -> str:
        """The secret that lets engines in, without a name behind it. May raise OSError."""

    def wait_until_connected(self, engines: int) -> None:
        """So many engines of this process are there now."""


class Binding(Protocol):
    """One engine and what keeps its weights up to date, as the binder sees it."""

    def leave(self) -> None:
        """End the connection to the agent: the engine is gone. From any thread."""


class Binder:
    """One for a process. ``open_agent`` is called with a folder of this process's own, and with the
    binder's event loop, when the first engine is constructed. Constructors may run in any thread.
    """

    def __init__(
        self, open_agent: Callable[[Path, asyncio.AbstractEventLoop], AgentSocket]
    ) -> None:
        self._open_agent = open_agent
        self._agent: AgentSocket | None = None
        # one engine is constructed at a time: its name travels by the environment
        self._lock = threading.RLock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._folder: Path | None = None
        self._count = 0
        self._bindings: dict[str, Binding] = {}
        self.metrics = BinderMetrics()

    def install(self) -> None:
        """From now on every engine that is constructed in this process is bound: the constructors
        of vLLM 0.32's ``LLMEngine`` and ``AsyncLLM`` are wrapped. To be called once.
        """
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.llm_engine import LLMEngine

        plugin.activate()
        _around_init(LLMEngine, self._lock, self._before, self._after_sync)
        _around_init(AsyncLLM, self._lock, self._before, self._after_async)
        _before_requests(AsyncLLM)
        _before_shutdown(AsyncLLM)

    # --- around a constructor ------------------------------------------------------------------

    def _before(self) -> settings.Settings:
        """The environment that this engine's processes get."""
        agent, folder = self._ready_for_engines()
        self._count += 1
        name = self._name()
        token_file = folder / f"{name}.token"
        token_file.touch(mode=0o600)  # before there is a secret in it
        token_file.write_text(f"{agent.token()}:{name}\n")
        os.environ["HOTWEIGHTS_SOCKET"] = str(agent.socket)
        os.environ["HOTWEIGHTS_TOKEN_FILE"] = str(token_file)
        return settings.read()

    def _after_sync(self, engine: Any, read: settings.Settings) -> None:
        from hotweights.adapters.inprocess.binding import SyncBinding

        problem = _unsuitable_sync(engine)
        if problem:
            logger.error("%s; it serves what it booted, without Hotweights", problem)
            return
        name = self._name()
        binding = SyncBinding(engine, read, self.metrics.note, lambda: self._moved_out(name))
        try:
            self._run(binding.join()).result(JOIN_SECONDS)
        # whatever it was: the engine serves, and the coordinator sees that it takes no part
        except Exception:
            logger.exception(
                "The engine could not be bound: it serves what it booted, without Hotweights"
            )
            binding.leave()
            return
        self._moved_in(engine, name, binding)

    def _after_async(self, engine: Any, read: settings.Settings) -> None:
        from hotweights.adapters.inprocess.binding import AsyncBinding

        problem = unsuitable(engine.vllm_config, getattr(engine, "_client_count", 1))
        if problem:
            logger.error("%s; it serves what it booted, without Hotweights", problem)
            return
        name = self._name()
        binding = AsyncBinding(engine, read, self.metrics.note, lambda: self._moved_out(name))
        engine.hotweights_binding = binding
        self._moved_in(engine, name, binding)  # first it counts: no commit passes it over
        binding.start()

    def _name(self) -> str:
        return f"engine-{os.getpid()}-{self._count}"

    def _moved_in(self, engine: Any, name: str, binding: Binding) -> None:
        self._bindings[name] = binding
        weakref.finalize(engine, self._moved_out, name)  # whoever forgets to shut it down
        if self._agent is not None:
            self._agent.wait_until_connected(len(self._bindings))

    def _moved_out(self, name: str) -> None:
        binding = self._bindings.pop(name, None)
        if binding is not None:
            binding.leave()
        if self._agent is not None:
            self._agent.wait_until_connected(len(self._bindings))

    # --- this process --------------------------------------------------------------------------

    def _ready_for_engines(self) -> tuple[AgentSocket, Path]:
        """The folder, the plugin on every child's path, the loop, and the agent, made once. What
        fails is tried again with the next engine.
        """
        if self._agent is None or self._folder is None:
            folder = Path(tempfile.mkdtemp(prefix="hotweights-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            _let_children_find(bundle.write(folder / "plugin"))
            self._loop = _loop_in_thread()
            self._agent = self._open_agent(folder, self._loop)
            self._folder = folder
            self.metrics.serve()
        return self._agent, self._folder

    def _run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop is None:
            raise RuntimeError("no engine was constructed yet")
        return asyncio.run_coroutine_threadsafe(work, self._loop)


def already_served() -> str:
    """Why this process needs no binder; empty: it does. Before this process has the plugin's folder
    on its path from us.
    """
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None:  # all that is found is loaded
        loaded = bool(entry_points(group="vllm.endpoint_plugins", name=ENDPOINT_PLUGIN))
    else:
        loaded = ENDPOINT_PLUGIN in [name.strip() for name in allowed.split(",")]
    if loaded and os.environ.get("HOTWEIGHTS_SOCKET"):
        return (
            "vLLM loads the server plugin here, and HOTWEIGHTS_SOCKET names an agent: that one "
            "updates this process's engine"
        )
    return ""


def _unsuitable_sync(engine: Any) -> str:
    config = engine.vllm_config
    if config.model_config.is_multimodal_model:
        return (
            "Hotweights does not update multi-modal models in a synchronous engine: use AsyncLLM, "
            "or vllm serve"
        )
    return unsuitable(config)


def _let_children_find(folder: Path) -> None:
    """Children that are spawned take over this path, others the environment's; an allow-list has to
    name us.
    """
    sys.path.append(str(folder))
    paths = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (paths, str(folder))))
    listed = os.environ.get("VLLM_PLUGINS")
    if listed is not None and GENERAL_PLUGIN not in listed.split(","):
        os.environ["VLLM_PLUGINS"] = ",".join(filter(None, (listed, GENERAL_PLUGIN)))


def _loop_in_thread() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="hotweights-binder", daemon=True).start()
    return loop


def _around_init(
    cls: Any,
    lock: threading.RLock,
    before: Callable[[], settings.Settings],
    after: Callable[[Any, settings.Settings], None],
) -> None:
    original = cls.__init__

    @wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        with lock:
            try:
                read = before()
            except Exception:  # a full disk, a worker that went away: no reason not to serve
                logger.exception(
                    "The engine will not be bound: it serves what it boots, without Hotweights"
                )
                original(self, *args, **kwargs)
                return
            original(self, *args, **kwargs)
            after(self, read)

    cls.__init__ = init


def _before_requests(cls: Any) -> None:
    original = cls.add_request

    @wraps(original)
    async def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        binding = getattr(self, "hotweights_binding", None)
        if binding is not None:
            await binding.joined()
        return await original(self, *args, **kwargs)

    cls.add_request = add_request


def _before_shutdown(cls: Any) -> None:
    original = cls.shutdown

    @wraps(original)
    def shutdown(self: Any, *args: Any, **kwargs: Any) -> Any:
        binding = getattr(self, "hotweights_binding", None)
        if binding is not None:
            binding.gone()
        return original(self, *args, **kwargs)

    cls.shutdown = shutdown


@dataclasses.dataclass(frozen=True, slots=True)
class HostAgent:
    """The worker of this host (`hotweights worker`): it stages, it speaks with the coordinator, its
    peers and its engines.
    """

    socket: Path
    token_file: Path

    def token(self) -> str:
        """The token as it lies beside the socket now. Raises OSError."""
        return self.token_file.read_text().strip()

    def wait_until_connected(self, engines: int) -> None:
        """Nothing to do: the host's worker counts the engines that are connected."""
