"""One rank of the engine: takes versions from the agent while it serves, and switches when the API
server says so.

Two sides meet here. The agent speaks over the link: what it orders (`command_queue`) is done on a
thread of its own, slowly, and touches nothing that serves. The API server speaks through vLLM's
collective RPC (`answer`): on the worker's main thread, between two steps of the model. Those
answers never raise. An exception on one rank would leave the other ranks' answers in vLLM's queues,
and every later call would read the answer to the one before it.

vLLM's own phases (start, update, finish) are refused: one weight-transfer engine has one master.

vLLM 0.32 builds it in each worker by ``WeightTransferEngineFactory`` and holds it as
``worker.weight_transfer_engine``; the abstract methods are those of
``vllm/distributed/weight_transfer/base.py``.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import pkgutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.parallel_state import get_world_group
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from hotweights.adapters.vllm import PLUGIN_VERSION, agent_connection, probe, settings
from hotweights.adapters.vllm.rank import sleep_mode, ways
from hotweights.adapters.vllm.rank.command_queue import CommandQueue
from hotweights.adapters.vllm.rank.image import Image
from hotweights.adapters.vllm.rank.preparer import SHORT
from hotweights.adapters.vllm.rank.shadow import leftovers
from hotweights.adapters.vllm.rank.versions import Rejection, Versions
from hotweights.adapters.vllm.suitability import unsuitable
from hotweights_transports.handoff import frames

logger = logging.getLogger("vllm.hotweights.engine")


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing: the agent hands everything over."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Nothing: vLLM's own updates are refused (`Engine.receive_weights`)."""


class Engine(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """One rank, between its agent and its API server. Two threads use it: the worker's main thread
    (`command`, and vLLM), and that of its `CommandQueue`.
    """

    # what vLLM asks of an engine's class
    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False  # versions have no draft model's weights

    def __init__(
        self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._settings = settings.read()
        self._unsupported = unsuitable(vllm_config)
        self._rank = get_world_group().rank_in_group
        self._versions = Versions(model, vllm_config, device, self._settings.prepare_share)
        if leftovers.may_sleep(vllm_config):
            worker_class = pkgutil.resolve_name(vllm_config.parallel_config.worker_cls)
            self._unsupported = self._unsupported or sleep_mode.watch(worker_class, _versions_of)
        self._orders = CommandQueue(self._prepare, self._release)
        if self._settings.socket:
            self._orders.later(_take_one_core)  # the first of all, because it is for that thread
            self._orders.start()  # before the link, which brings orders
            agent_connection.AgentLink(
                self._settings.socket,
                self._hello,
                self._orders.handle,
                lost=self._orders.refuse,
                closed=self._orders.forget,
            ).start()

    # --- the agent's side ----------------------------------------------------------------------

    def _hello(self) -> frames.Hello:
        """On the link's thread, so without the lock. A rank says nothing of what it serves: the
        server process does.
        """
        return frames.Hello(
            role="rank",
            token=agent_connection.read_token(self._settings.token_file),
            rank=self._rank,
            world_size=self.parallel_config.world_size,
            instance=self.vllm_config.instance_id,
            plugin=PLUGIN_VERSION,
            engine=probe.engine_kind(self.vllm_config),
            state="Serving",
            unsupported=self._unsupported,
            held=self._versions.held,
        )

    def _prepare(
        self, connection: agent_connection.Connection, frame: frames.Prepare, fds: list[int]
    ) -> None:
        began = time.monotonic()
        digest = frame.digest
        wish = ways.Wish(frame.memory, frame.max_pause_seconds)
        reason = ""
        try:
            if self._unsupported:
                raise Rejection("EngineUnsupported", self._unsupported)
            nbytes, way = self._versions.take(
                digest, fds, wish, lambda: self._orders.released == digest
            )
        except Rejection as error:
            reason = error.reason
            logger.warning("Rejected %s: %s: %s", digest[:SHORT], reason, error)
            connection.send(
                frames.Rejected(
                    # cut: a loader's error may show a whole tensor, and a frame has a limit
                    id=frame.id,
                    digest=digest,
                    reason=error.reason,
                    message=str(error)[:2000],
                )
            )
        else:
            seconds = time.monotonic() - began
            logger.info(
                "Prepared %s in %.2f s, %.1f MB%s",
                digest[:SHORT],
                seconds,
                nbytes / 1e6,
                f", {way}" if way else "",
            )
            connection.send(
                frames.Prepared(id=frame.id, digest=digest, seconds=seconds, nbytes=nbytes, way=way)
            )
        # what was loaded in vain; only now, because an exception holds what its functions held. Who
        # is busy commits or repairs: that is a pause, and ends with tidying
        if reason not in ("", "Busy", "EngineUnsupported"):
            self._versions.tidy()

    def _release(self, connection: agent_connection.Connection, frame: frames.Release) -> None:
        self._versions.release(frame.digest)
        # whether or not it could be let go: the agent may let go of its own
        connection.send(frames.Released(id=frame.id, digest=frame.digest))

    # --- the API server's side -----------------------------------------------------------------

    def command(self, name: str, argument: Any) -> dict[str, Any]:
        """On the worker's main thread, between two steps of the model. Gives a dict with ``ok`` and
        ``rank``; may raise, and `answer` catches it.
        """
        commands: dict[str, Callable[[Any], dict[str, Any]]] = {
            "check": self._check,
            "unpin": self._unpin,
            "install": self._install,
            "settle": self._settle,
            "repair": self._repair,
            "describe": self._describe,
            "freeze": self._freeze,
            "watch": self._watch,
        }
        return commands[name](argument)

    def _freeze(self, _: Any) -> dict[str, Any]:
        """At boot: what the process has by now is never garbage. Else every `Versions.tidy` would walk
        through all of it, and hold the interpreter for half a second while requests run. vLLM does
        the same in its other processes, and in GPU workers.
        """
        gc.collect()
        gc.freeze()
        return {"ok": True, "rank": self._rank}

    def _watch(self, _: bool) -> dict[str, Any]:
        """Count NaN in the logits, or no longer (`answer` does it)."""
        return {"ok": True, "rank": self._rank}

    def _describe(self, _: Any) -> dict[str, Any]:
        return {"ok": True, "rank": self._rank, **self._versions.describe()}

    def _check(self, digest: str) -> dict[str, Any]:
        """Is it here, complete? From a yes on, nothing replaces it until `install` or `unpin`."""
        image = self._versions.check(digest)
        return {
            "ok": True,
            "rank": self._rank,
            "version": image.table.version,
            "probes": self._probes(image),
        }

    def _probes(self, image: Image) -> list[dict[str, Any]]:
        """The golden tokens that this kind of engine has to answer; others' would differ in
        numerics.
        """
        kind = probe.engine_kind(self.vllm_config)
        return [item for item in image.table.probes if item.get("engine") == kind]

    def _unpin(self, _: Any) -> dict[str, Any]:
        """The commit ended before its copy."""
        self._versions.unpin()
        return {"ok": True, "rank": self._rank}

    def _install(self, digest: str) -> dict[str, Any]:
        """Copy, inside the pause."""
        began = time.monotonic()
        nbytes = self._versions.install(digest)
        seconds = time.monotonic() - began
        return {"ok": True, "rank": self._rank, "seconds": seconds, "nbytes": nbytes}

    def _settle(self, _: Any) -> dict[str, Any]:
        """After the resume: memory goes back, on the other thread."""
        self._orders.later(self._versions.settle)
        return {"ok": True, "rank": self._rank}

    def _repair(self, digest: str | None) -> dict[str, Any]:
        """Bring a version back whole, into a model in any state."""
        self._versions.repair(digest)
        return {"ok": True, "rank": self._rank}

    # --- vLLM's phases -------------------------------------------------------------------------

    # the abstract methods of vLLM's base class: its dev routes lead here

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        raise RuntimeError(_MASTER)

    def start_weight_update(self) -> None:
        raise RuntimeError(_MASTER)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        raise RuntimeError(_MASTER)

    def finish_weight_update(self) -> None:
        raise RuntimeError(_MASTER)

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Asked of a trainer's process, and up to vLLM 0.27 abstract here."""
        raise RuntimeError(_MASTER)

    def shutdown(self) -> None:
        """The worker ends: a version that is being prepared would hold it up."""
        self._versions.call_off()


_MASTER = (
    "the weights of this engine are managed by Hotweights: change the WeightRollout, "
    "or set another --weight-transfer-config and opt the pod out"
)


def _versions_of(worker: Any) -> Versions | None:
    engine = getattr(worker, "weight_transfer_engine", None)
    return engine._versions if isinstance(engine, Engine) else None


def _take_one_core() -> None:
    """Of this thread: the other cores are for serving."""
    with contextlib.suppress(RuntimeError):
        torch.set_num_threads(1)


def answer(worker: Any, command: str, argument: Any) -> dict[str, Any]:
    """A rank's answer to the API server: always a dict with ``ok``, never an exception. Called
    through vLLM's ``collective_rpc`` as a method of ``WorkerBase`` (`plugin.activate`), on the
    worker's main thread.
    """
    engine = getattr(worker, "weight_transfer_engine", None)
    if not isinstance(engine, Engine):
        return _no(
            -1,
            "CommitFailed",
            "this engine has another --weight-transfer-config; remove it, or opt the pod out",
        )
    try:
        try:
            result = engine.command(command, argument)
        except Rejection as error:
            result = _no(engine._rank, error.reason, str(error))
        if (
            command == "install"
            and result["ok"]
            and hasattr(worker.model_runner, "reset_lora_state")
        ):
            # as vLLM's own finish of an update does (``v1/worker/gpu_worker.py``): adapters do not
            # outlive the base weights that they were loaded for
            worker.model_runner.reset_lora_state()
        # from a copy on until the pause has ended
        if command in ("install", "repair", "settle", "watch"):
            on = argument if command == "watch" else command != "settle"
            probe.watch_for_nan(worker.model_runner, on)
    # any loader may raise anything, and raising here would break vLLM's queues
    except Exception as error:
        logger.exception("%s failed", command)
        # cut: it becomes a part of one message to the agent
        return _no(engine._rank, "CommitFailed", f"{type(error).__name__}: {error}"[:1000])
    return result


def _no(rank: int, reason: str, message: str) -> dict[str, Any]:
    return {"ok": False, "rank": rank, "reason": reason, "message": message}
