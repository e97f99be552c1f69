"""The versions of one rank: mapped, got ready while the model serves, and put into it in the pause.

Two threads use it. Getting ready is slow and runs on a thread of its own, for which it keeps the
lock; everything else is the worker's main thread, between two steps of the model, and a check that
finds the lock taken says no instead of waiting. Between a commit's check and its copy the version
is pinned: nothing may replace it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Callable
from typing import Any

import torch

from hotweights.adapters.vllm.rank import reload, room, ways
from hotweights.adapters.vllm.rank.image import Image
from hotweights.adapters.vllm.rank.preparer import Abandoned, Preparer
from hotweights.adapters.vllm.rank.room import NoRoom
from hotweights.adapters.vllm.rank.shadow import leftovers
from hotweights.adapters.vllm.rank.shadow.materials import Incomplete
from hotweights.adapters.vllm.rank.sleep_mode import ASLEEP
from hotweights.adapters.vllm.rank.table import ImageError


class Rejection(Exception):
    """A version cannot be prepared or committed; ``reason`` is of the wire's list
    (`frames.Rejected`).
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Versions:
    """What this rank holds of versions, and what its model serves."""

    def __init__(
        self, model: torch.nn.Module, vllm_config: Any, device: torch.device, share: float
    ) -> None:
        """On the worker's main thread. ``share``: of the time, that getting ready may work
        (`Throttle`).
        """
        self._model = model
        self._device = device
        self._lock = threading.RLock()
        self._images: dict[str, Image] = {}  # in the order of their arrival
        self._arriving: Image | None = None  # that is being got ready, and not held yet
        self.digest: str | None = None  # what the model holds; None: what it booted
        self._previous: str | None = None
        self._ready: str | None = None  # what can be installed, by `_way`
        self._ready_on: str | None = None  # what the model has to hold for that to be enough
        self._way: ways.Way | None = None
        self._pinned: str | None = None
        self._call_off = threading.Event()
        self._may_sleep = leftovers.may_sleep(vllm_config)
        self._asleep = False  # the model's memory is not there
        self._preparer = Preparer(model, vllm_config, device, share, self._image)

    @property
    def held(self) -> list[str]:
        """Digests that are mapped."""
        return list(self._images)

    def describe(self) -> dict[str, Any]:
        """For whoever looks into a worker."""
        return {
            "digest": self.digest,
            "ready": self._ready,
            "way": self._way.name if self._way is not None else None,
            "held": self.held,
            "shadow": self._preparer.shadow is not None,
        }

    # --- while the model serves, on the thread that prepares -------------------------------------

    def take(
        self, digest: str, fds: list[int], wish: ways.Wish, released: Callable[[], bool]
    ) -> tuple[int, str]:
        """Map a version, ask whether it fits, and get it ready. Gives the image's bytes and the
        way. ``released``: whether nobody wants it any more. Raises `Rejection`.
        """
        if self._asleep and digest != self.digest:  # at once, and again below
            raise Rejection("Busy", ASLEEP)
        try:
            image = Image.open(fds, digest, room.check_mappings)
            held = self._images.get(digest)
            # the loaders were asked already: what serves is handed over anew after each restart of
            # the agent, and shall cost it a mapping and no more
            known = held is not None and image.same_specs(held)
            misfit = None if known else self._preparer.compatibility.check(image)
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
            # the same bytes, perhaps in younger memory: the older is let go of
            if digest != self.digest and not (self._is_ready(digest) and self._suits(wish)):
                if self._asleep:
                    raise Rejection("Busy", ASLEEP)
                self._get_ready(image, wish, released)
            elif isinstance(self._way, ways.Reload) and self._ready == digest:
                image.populate()  # as for the one before it: nothing but the pause reads it
            self._hold(image)
            way = self._way.name if self._way is not None and self._is_ready(digest) else ""
        self.tidy()  # without the lock: a commit's check that finds it taken says no
        return image.nbytes, way

    def _get_ready(self, image: Image, wish: ways.Wish, released: Callable[[], bool]) -> None:
        # who may sleep may be given other weights by vLLM's own commands when it wakes
        served = None if self._may_sleep else self._images.get(self.digest or "")
        # before anything changes: a check must not find the old one, and its memory counts as free
        self._drop()
        self._arriving = image
        try:
            way = self._preparer.prepare(
                image, served, wish, lambda: self._call_off.is_set() or released()
            )
        # "Busy" is what an agent asks again after
        except Abandoned as error:
            raise Rejection("Busy", "called off; prepare it again if it is still wanted") from error
        except (NoRoom, torch.OutOfMemoryError) as error:
            raise Rejection("InsufficientMemory", str(error)) from error
        except Incomplete as error:
            raise Rejection("MissingTensor", str(error)) from error
        # any model's loader may raise anything; what is served is untouched
        except Exception as error:
            raise Rejection("LoadFailed", f"{type(error).__name__}: {error}") from error
        finally:
            self._arriving = None
        self._way, self._ready, self._ready_on = way, image.digest, self.digest

    def release(self, digest: str) -> None:
        """Nobody wants it any more. One that is pinned is about to be copied, and what serves is
        what a broken switch goes back to: those `_hold` lets go of later.
        """
        with self._lock:
            if digest not in (self._pinned, self.digest):
                self._images.pop(digest, None)
                if self._ready == digest:
                    self._drop()
        self.tidy()

    def _hold(self, image: Image) -> None:
        """Keep what serves, what served before it (the way back), and the newest; an agent that
        forgot to release fills no memory.
        """
        self._images.pop(image.digest, None)
        self._images[image.digest] = image
        needed = {self.digest, self._previous, self._ready, image.digest}
        for digest in [digest for digest in self._images if digest not in needed]:
            del self._images[digest]
        self._preparer.keep_only(self._images)

    def _image(self, digest: str) -> Image:
        """A version's younger image: a way that kept one would keep the memory of an agent that has
        gone. Raises KeyError.
        """
        arriving = self._arriving
        if arriving is not None and arriving.digest == digest:
            return arriving
        return self._images[digest]

    def settle(self) -> None:
        """After a commit: the memory of what was got ready goes back."""
        with self._lock:
            if self._pinned is None and self._ready in (None, self.digest):
                self._drop()
        self.tidy()

    def call_off(self) -> None:
        """Whoever gets a version ready stops at its next breath; until `repair` has ended."""
        self._call_off.set()

    def fall_asleep(self) -> None:
        """vLLM takes the model's memory away: what was got ready beside it is let go of, and until
        `wake` nothing is. On the worker's main thread; waits for who gets ready to stop. Raises
        RuntimeError inside a commit, which no sleep may break.
        """
        if self._pinned is not None:
            raise RuntimeError(f"{self._pinned} is being committed: sleep again afterwards")
        self._asleep = True
        self._call_off.set()
        try:
            with self._lock:
                self._drop()
        finally:
            self._call_off.clear()

    def wake(self) -> None:
        """The model's memory is there again."""
        self._asleep = False

    @staticmethod
    def tidy() -> None:
        """Give memory back; outside the pause, because collecting stops every thread. glibc keeps
        what was freed until malloc_trim(3); other C libraries have none.
        """
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)

    # --- on the worker's main thread -------------------------------------------------------------

    def check(self, digest: str) -> Image:
        """Is it here, and ready? From a yes on, nothing replaces it until `install` or `unpin`.
        Raises `Rejection`.
        """
        if self._asleep:
            raise Rejection("Busy", ASLEEP)
        # not waiting: this thread steps the model, and getting ready takes seconds
        if not self._lock.acquire(blocking=False):
            raise Rejection("NotPrepared", "another version is being prepared")
        try:
            image = self._images.get(digest)
            if image is None or self._way is None or not self._is_ready(digest):
                raise Rejection("NotPrepared", f"{digest} is not prepared on this rank")
            try:
                self._way.check()
            except NoRoom as error:
                self._drop()  # prepared again, it may find room in another way
                raise Rejection("NotPrepared", str(error)) from error
            self._pinned = digest
            return image
        finally:
            self._lock.release()

    def unpin(self) -> None:
        """The commit ended before its copy."""
        self._pinned = None

    def install(self, digest: str) -> int:
        """Inside the pause: the model has this version from here on. Gives bytes copied. While the
        pin holds, nobody keeps the lock for longer than it takes to answer "Busy". Raises
        `Rejection` if it was not checked, or has no room any more; after anything else the model
        is dirty.
        """
        with self._lock:
            if self._pinned != digest or self._way is None:
                raise Rejection("NotPrepared", f"{digest} was not checked")
            try:
                self._way.check()
            except NoRoom as error:
                self._pinned = None
                raise Rejection("InsufficientMemory", str(error)) from error
            try:
                nbytes = self._way.install()
                self._synchronize()  # a copy that fails must fail here, not in the next step
            finally:
                self._pinned = None
            self._previous, self.digest = self.digest, digest
            return nbytes

    def repair(self, digest: str | None) -> None:
        """Bring a version back whole, into a model in any state; None: what it booted. Paused
        anyway, so without resting. Raises `Rejection` if it is not held.
        """
        if self._asleep:
            raise Rejection("Busy", ASLEEP)
        self._call_off.set()  # else the lock would be waited for as long as a version is prepared
        try:
            with self._lock:
                # first of all: what a failed reload left would be skipped by the next
                reload.purge(self._model)
                self._pinned = None
                self._drop()
                image = None if digest is None else self._images.get(digest)
                if digest is not None and image is None:
                    raise Rejection("EngineDirty", f"{digest} is not held any more")
                self._preparer.repair(image)
                self._synchronize()
                self.digest, self._previous = digest, None
        finally:
            self._call_off.clear()
        self.tidy()

    def _is_ready(self, digest: str) -> bool:
        """A part of a version is enough only where the rest of it serves."""
        return self._ready == digest and (
            self._ready_on == self.digest or isinstance(self._way, ways.Reload)
        )

    def _suits(self, wish: ways.Wish) -> bool:
        """Whether the way in which a version is ready is one that is allowed now."""
        way = self._way
        if way is None or way.name == "Reload":
            return True  # it is chosen for want of another
        if way.name == "InPause" and (way.pause_seconds or 0.0) > wish.max_pause_seconds:
            return False
        return wish.way in (ways.AUTO, way.name)

    def _drop(self) -> None:
        self._ready = self._ready_on = None
        if self._way is not None:
            self._way.drop()
            self._way = None
        self._preparer.clear()

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
