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
import ctypes
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
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
from hotweights.adapters.vllm.rank import reload, room
from hotweights.adapters.vllm.rank.command_queue import CommandQueue
from hotweights.adapters.vllm.rank.compatibility import Compatibility
from hotweights.adapters.vllm.rank.image import Image, ImageError
from hotweights.adapters.vllm.rank.room import NoRoom
from hotweights.adapters.vllm.rank.shadow import Incomplete, Shadow, Unsupported
from hotweights.adapters.vllm.rank.throttle import Throttle
from hotweights.adapters.vllm.suitability import unsuitable
from hotweights_transports.handoff import frames

logger = logging.getLogger("vllm.hotweights.engine")


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing: the agent hands everything over."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Nothing: vLLM's own updates are refused (`Engine.receive_weights`)."""


class Abandoned(Exception):
    """Preparing was called off: the version was released, or the engine needs the shadow for a
    repair.
    """


class Rejection(Exception):
    """A version cannot be prepared; ``reason`` is of the wire's list (`frames.Rejected`)."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Engine(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """One rank's versions. Two threads use it: the worker's main thread (`command`, and vLLM), and
    that of its `CommandQueue`; the lock is held for as long as a version is prepared.
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
        self._images: dict[str, Image] = {}  # in the order of their arrival
        self._digest: str | None = None  # what the model holds; None: what it booted
        self._previous: str | None = None
        self._ready: str | None = None  # what the shadow holds
        self._plain: set[str] = set()  # versions that can only be loaded inside the pause
        self._pinned: str | None = None  # between a commit's check and its copy nothing may change
        self._call_off = threading.Event()
        self._lock = threading.RLock()  # the shadow and the fields above
        self._stream = (
            None if device.type == "cpu" else torch.get_device_module(device).Stream(device)
        )
        self._orders = CommandQueue(self._prepare, self._release)
        self._shadow = self._build_shadow()
        # A skeleton of its own: asking what fits must not disturb a version that is ready to be
        # committed.
        self._compatibility = Compatibility(
            vllm_config, self._build_shadow() if self._shadow is not None else None
        )
        if self._settings.socket:
            self._orders.later(_take_one_core)  # the first of all, because it is for that thread
            self._orders.start()  # before the link, which brings orders
            agent_connection.AgentLink(
                self._settings.socket, self._hello, self._orders.handle, closed=self._orders.forget
            ).start()

    def _build_shadow(self) -> Shadow | None:
        try:
            return Shadow(self.model, self.vllm_config, self.device)
        except Exception as error:  # noqa: BLE001 - any model's constructor may raise anything; then the plain way remains
            logger.warning(
                "No second model beside this one (%s): versions are loaded inside the pause", error
            )
            return None

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
            held=list(self._images),
        )

    def _prepare(
        self, connection: agent_connection.Connection, frame: frames.Prepare, fds: list[int]
    ) -> None:
        began = time.monotonic()
        try:
            nbytes = self._take(frame.digest, fds)
        except Rejection as error:
            # 19 characters of a digest: "sha256:" and twelve digits are enough to find it
            logger.warning("Rejected %s: %s: %s", frame.digest[:19], error.reason, error)
            connection.send(
                frames.Rejected(
                    # cut: a loader's error may show a whole tensor, and a frame has a limit
                    id=frame.id,
                    digest=frame.digest,
                    reason=error.reason,
                    message=str(error)[:2000],
                )
            )
        else:
            seconds = time.monotonic() - began
            logger.info("Prepared %s in %.2f s, %.1f MB", frame.digest[:19], seconds, nbytes / 1e6)
            connection.send(
                frames.Prepared(id=frame.id, digest=frame.digest, seconds=seconds, nbytes=nbytes)
            )

    def _take(self, digest: str, fds: list[int]) -> int:
        """Map a version, ask whether it fits, and finish it. Gives the image's bytes. Raises
        `Rejection`.
        """
        if self._unsupported:
            raise Rejection("EngineUnsupported", self._unsupported)
        try:
            image = Image.open(fds, digest, room.check_mappings)
            held = self._images.get(digest)
            # the loaders were asked already: what serves is handed over anew after each restart of
            # the agent, and shall cost it a mapping and no more
            known = held is not None and image.same_specs(held)
            misfit = None if known else self._compatibility.check(image)
        except ImageError as error:
            raise Rejection("MapFailed", str(error)) from error
        except NoRoom as error:
            raise Rejection("InsufficientMemory", str(error)) from error
        if misfit is not None:
            raise Rejection(misfit.reason, misfit.message)
        with self._lock:
            if self._pinned is not None:
                raise Rejection(
                    "Busy", f"{self._pinned} is being committed; prepare again afterwards"
                )
            if (
                digest in (self._digest, self._ready)
                or digest in self._plain
                or self._shadow is None
            ):
                # the same bytes, perhaps in younger memory: the older is let go of
                self._hold(image)
                return image.nbytes
            self._ready = None  # before the shadow changes: a check must not find the old one
            throttle = Throttle(self._settings.prepare_share)

            def breathe() -> None:
                if self._call_off.is_set() or self._orders.released == digest:
                    raise Abandoned(digest)
                throttle()

            try:
                self._shadow.clear()  # what the last one left counts as free
                room.check_copy(self._shadow.nbytes, self.device)
                with self._stream_of_its_own():
                    self._shadow.load(
                        self._compatibility.tensors(image),
                        self._compatibility.filled(digest),
                        breathe,
                        proven=self._compatibility.proven,
                    )
                self._ready = digest
            # "Busy" is what an agent asks again after
            except Abandoned as error:
                raise Rejection(
                    "Busy", "called off; prepare it again if it is still wanted"
                ) from error
            except Unsupported as error:
                logger.warning(
                    "Cannot finish %s beside the model (%s): it is loaded inside the pause",
                    digest[:19],
                    error,
                )
                self._plain.add(digest)
            except (NoRoom, torch.OutOfMemoryError) as error:
                raise Rejection("InsufficientMemory", str(error)) from error
            except Incomplete as error:
                raise Rejection("MissingTensor", str(error)) from error
            # any model's loader may raise anything; what is served is untouched
            except Exception as error:
                raise Rejection("LoadFailed", f"{type(error).__name__}: {error}") from error
            self._hold(image)
        self._tidy()  # without the lock: a commit's check that finds it taken says no
        return image.nbytes

    @contextlib.contextmanager
    def _stream_of_its_own(self) -> Iterator[None]:
        """On a GPU, what this thread does waits for no step of the model and holds none up; when
        this ends, it is done, and the worker's main thread may copy it by a stream of its own.
        """
        if self._stream is None:
            yield
            return
        backend = torch.get_device_module(self.device)
        backend.set_device(self.device)  # each thread begins with device 0
        with backend.stream(self._stream):
            yield
            self._stream.synchronize()

    def _release(self, connection: agent_connection.Connection, frame: frames.Release) -> None:
        with self._lock:
            # a pinned one is about to be copied, and what serves is what a broken switch goes back
            # to; `_hold` lets go of it later. The answer is the same: the agent may let go of its
            # own
            if frame.digest not in (self._pinned, self._digest):
                self._images.pop(frame.digest, None)
                if self._ready == frame.digest and self._shadow is not None:
                    self._ready = None
                    self._shadow.clear()
        self._tidy()
        connection.send(frames.Released(id=frame.id, digest=frame.digest))

    def _hold(self, image: Image) -> None:
        """Keep what serves, what served before it (the way back), and the newest; an agent that
        forgot to release fills no memory.
        """
        self._images.pop(image.digest, None)
        self._images[image.digest] = image
        needed = {self._digest, self._previous, self._ready, image.digest}
        for digest in [digest for digest in self._images if digest not in needed]:
            del self._images[digest]
        self._compatibility.keep_only(self._images)
        self._plain &= self._images.keys()

    @staticmethod
    def _tidy() -> None:
        """Give memory back; outside the pause, because collecting stops every thread. glibc keeps
        what was freed until malloc_trim(3); other C libraries have none.
        """
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)

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
        """At boot: what the process has by now is never garbage. Else every `_tidy` would walk
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
        return {
            "ok": True, "rank": self._rank, "digest": self._digest, "ready": self._ready,
            "held": list(self._images), "shadow": self._shadow is not None,
        }  # fmt: skip

    def _check(self, digest: str) -> dict[str, Any]:
        """Is it here, complete? From a yes on, nothing replaces it until `install` or `unpin`."""
        # not waiting: this thread steps the model, and preparing takes seconds
        if not self._lock.acquire(blocking=False):
            return _no(self._rank, "NotPrepared", "another version is being prepared")
        try:
            image = self._images.get(digest)
            finished = self._shadow is None or digest in self._plain or self._ready == digest
            if image is None or not finished:
                return _no(self._rank, "NotPrepared", f"{digest} is not prepared on this rank")
            self._pinned = digest
            return {
                "ok": True,
                "rank": self._rank,
                "version": image.table.version,
                "probes": self._probes(image),
            }
        finally:
            self._lock.release()

    def _probes(self, image: Image) -> list[dict[str, Any]]:
        """The golden tokens that this kind of engine has to answer; others' would differ in
        numerics.
        """
        kind = probe.engine_kind(self.vllm_config)
        return [item for item in image.table.probes if item.get("engine") == kind]

    def _unpin(self, _: Any) -> dict[str, Any]:
        """The commit ended before its copy."""
        self._pinned = None
        return {"ok": True, "rank": self._rank}

    def _install(self, digest: str) -> dict[str, Any]:
        """Copy, inside the pause. While the pin holds, nobody keeps the lock for longer than it
        takes to answer "Busy".
        """
        began = time.monotonic()
        with self._lock:
            if self._pinned != digest:
                return _no(self._rank, "NotPrepared", f"{digest} was not checked")
            try:
                if self._shadow is not None and self._ready == digest:
                    nbytes = self._shadow.install()
                else:
                    image = self._images[digest]
                    nbytes = image.nbytes
                    tensors = self._compatibility.tensors(image)
                    reload.reload(self.model, self.vllm_config, tensors)
                self._synchronize()  # a copy that fails must fail here, not in the next step
            finally:
                self._pinned = None
            self._previous, self._digest = self._digest, digest
        return {
            "ok": True,
            "rank": self._rank,
            "seconds": time.monotonic() - began,
            "nbytes": nbytes,
        }

    def _settle(self, _: Any) -> dict[str, Any]:
        """After the resume: the shadow's memory goes back, on the other thread."""

        def settle() -> None:
            with self._lock:
                if self._shadow is not None and self._ready == self._digest:
                    self._ready = None
                    self._shadow.clear()
            self._tidy()

        self._orders.later(settle)
        return {"ok": True, "rank": self._rank}

    def _repair(self, digest: str | None) -> dict[str, Any]:
        """Bring a version back whole, into a model in any state. Paused anyway, so without
        resting.
        """
        self._call_off.set()  # else the lock would be waited for as long as a version is prepared
        try:
            with self._lock:
                # first of all: what a failed reload left would be skipped by the next
                reload.purge(self.model)
                self._ready = self._pinned = None
                if digest is not None and digest not in self._images:
                    return _no(self._rank, "EngineDirty", f"{digest} is not held any more")
                self._load_whole(digest)
                self._synchronize()
                self._digest, self._previous = digest, None
        finally:
            self._call_off.clear()
        self._tidy()
        return {"ok": True, "rank": self._rank}

    def _load_whole(self, digest: str | None) -> None:
        """Beside the model if that works, else in place."""
        if self._shadow is not None:
            try:
                self._shadow.load(
                    self._whole(digest), self._compatibility.filled(digest), lambda: None
                )
                self._shadow.install()
                self._shadow.clear()
            except Unsupported as error:
                logger.warning("Repairing inside the pause: %s", error)
            else:
                return
        reload.reload(self.model, self.vllm_config, self._whole(digest))

    def _whole(self, digest: str | None) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a held version; None: those that the engine booted from."""
        if digest is None:
            return iter(reload.boot_tensors(self.model, self.vllm_config))
        return self._compatibility.tensors(self._images[digest])

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

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

    def shutdown(self) -> None:
        """The worker ends: a version that is being prepared would hold it up."""
        self._call_off.set()


_MASTER = (
    "the weights of this engine are managed by Hotweights: change the WeightRollout, "
    "or set another --weight-transfer-config and opt the pod out"
)


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
        result = engine.command(command, argument)
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
