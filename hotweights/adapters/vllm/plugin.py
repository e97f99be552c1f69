"""What vLLM's ``vllm.general_plugins`` entry point calls, in the API server, in EngineCore and in
every worker.

It makes our weight-transfer engine known, chooses it where the command line chose none, and gives
workers and EngineCore the methods through which the API server reaches them. EngineCore's do
several steps in one visit, because inside the pause each way there and back waits for a core on a
busy machine. It may run several times in a process, and it must never keep a vLLM from starting: on
a version that it does not know it says so and does nothing.
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Any

from hotweights.adapters.vllm import ENDPOINT_PLUGIN, releases, settings

BACKEND = "hotweights"
# methods that `activate` adds to vLLM's classes, called by these names
WORKER_METHOD = "hotweights_rank"
SWITCH_METHOD = "hotweights_switch"
OPEN_METHOD = "hotweights_open"
IMPLEMENTED = frozenset(
    {
        "init_transfer_engine",
        "start_weight_update",
        "receive_weights",
        "finish_weight_update",
        "shutdown",
        "trainer_send_weights",
    }
)
"""What `rank.engine.Engine` has of what vLLM's base class demands: with one more it could not be
made, and the engine would not start.
"""
logger = logging.getLogger("vllm.hotweights.plugin")


def register() -> None:
    """The entry point. Never raises for a vLLM that it does not know; a variable with a wrong value
    does (`SettingsError`).
    """
    if not settings.read().socket:
        logger.info("Hotweights is installed but HOTWEIGHTS_SOCKET is not set: it does nothing")
        return
    # whether or not the engine can be updated: it is the endpoint plugin that says so
    _have_the_endpoint_plugin_loaded()
    problem = unsupported()
    if problem:
        logger.error("%s", problem)
        return
    activate()


def activate() -> None:
    """Make the engine known and choose it, in this process; for a vLLM that is supported. Each part
    is done once, however often it is called.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as Factory
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.worker_base import WorkerBase

    if BACKEND not in Factory._registry:
        Factory.register_engine(BACKEND, "hotweights.adapters.vllm.rank.engine", "Engine")
    if not hasattr(WorkerBase, WORKER_METHOD):
        setattr(WorkerBase, WORKER_METHOD, _ask_rank)
    if not hasattr(EngineCore, SWITCH_METHOD):
        setattr(EngineCore, SWITCH_METHOD, _switch)
        setattr(EngineCore, OPEN_METHOD, _open)
    _choose_backend(EngineArgs)


def unsupported() -> str:
    """Why this vLLM cannot be updated in place, with the remedy; empty when it can. First by its
    release, then by what it has: a build that was changed may lack what its release has.
    """
    try:
        import vllm
    except ImportError as error:
        return f"Hotweights finds no vLLM to update ({error}): install one"
    version = getattr(vllm, "__version__", "?")
    problem = releases.refusal(version)
    if problem:
        return problem
    try:
        from vllm.distributed.weight_transfer.base import WeightTransferEngine
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.worker.worker_base import WorkerBase
    except ImportError as error:
        return _changed(version, str(error))
    missing = [
        f"{cls.__name__}.{name}"
        for cls, names in (
            (
                WeightTransferEngine,
                ("start_weight_update", "finish_weight_update", "update_weights"),
            ),
            (EngineCore, ("pause_scheduler", "resume_scheduler", "step")),
            (WorkerBase, ("load_model",)),
        )
        for name in names
        if not hasattr(cls, name)
    ]
    if missing:
        return _changed(version, f"it has no {', '.join(missing)}")
    demanded = WeightTransferEngine.__abstractmethods__ - IMPLEMENTED
    if demanded:
        return _changed(version, f"it demands {', '.join(sorted(demanded))} of weight transfer")
    return ""


def _changed(version: str, what: str) -> str:
    return (
        f"this vLLM {version} is not as its release ({what}), so its weights cannot be updated: "
        "run an unchanged one"
    )


def _have_the_endpoint_plugin_loaded() -> None:
    """vLLM loads endpoint plugins only if VLLM_PLUGINS names them, and a name there switches off
    what loads unnamed: where it is not set, ours is named for this one question (vLLM 0.32,
    ``vllm/plugins``). Where it is set, `startup` has named it.
    """
    try:
        from vllm import envs, plugins
    except ImportError:
        return  # `unsupported` says so

    original = getattr(plugins, "load_endpoint_plugins", None)
    if original is None or getattr(original, "hotweights", False):
        return

    @functools.wraps(original)
    def load_endpoint_plugins(*args: Any, **kwargs: Any) -> Any:
        if envs.VLLM_PLUGINS is not None:
            return original(*args, **kwargs)
        # hides the value, also a cached one, that the module otherwise makes of the environment
        envs.VLLM_PLUGINS = [ENDPOINT_PLUGIN]
        try:
            return original(*args, **kwargs)
        finally:
            del envs.VLLM_PLUGINS

    load_endpoint_plugins.hotweights = True  # type: ignore[attr-defined]
    plugins.load_endpoint_plugins = load_endpoint_plugins


def _choose_backend(engine_args: Any) -> None:
    """Set the backend where nobody did. Not in ``__post_init__``: vLLM loads its plugins there, too
    late for that very call.
    """
    original = engine_args.create_engine_config
    if getattr(original, "hotweights", False):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.config.weight_transfer import WeightTransferConfig

        if self.weight_transfer_config is None:
            self.weight_transfer_config = WeightTransferConfig(backend=BACKEND)
        if self.weight_transfer_config.backend == BACKEND:
            _stay_eager_on_cpu(self)
        return original(self, *args, **kwargs)

    create_engine_config.hotweights = True  # type: ignore[attr-defined]
    engine_args.create_engine_config = create_engine_config


def _stay_eager_on_cpu(engine_args: Any) -> None:
    """vLLM's CPU layers keep packed weights in closures; a compiled graph would go on using those
    that it was compiled with.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and not engine_args.enforce_eager:
        logger.warning(
            "On CPUs weights can only be exchanged in eager mode: --enforce-eager is set for this "
            "engine"
        )
        engine_args.enforce_eager = True


def _ask_rank(worker: Any, command: str, argument: Any = None) -> dict[str, Any]:
    # imported here: this module is loaded in processes that have no rank
    from hotweights.adapters.vllm.rank import engine

    return engine.answer(worker, command, argument)


def _switch(
    core: Any, digest: str | None, prompts: list[list[int]], lengths: list[int]
) -> dict[str, Any]:
    """Copy on every rank (not without a digest), and probe if none said no; paused before and
    after.
    """
    from hotweights.adapters.vllm import probe

    began = time.monotonic()
    ranks = [] if digest is None else core.collective_rpc(WORKER_METHOD, args=("install", digest))
    copy_seconds = time.monotonic() - began
    answers = probe.run(core, prompts, lengths) if all(rank["ok"] for rank in ranks) else []
    return {"ranks": ranks, "copySeconds": copy_seconds, "answers": answers}


def _open(core: Any, version: str) -> None:
    """What is confirmed gets its name, and is served. The name first, so that no answer goes out
    under the old one.
    """
    if releases.api().has_weight_version:
        core.set_weight_version(version)
    core.resume_scheduler()
