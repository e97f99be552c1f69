"""Getting a version ready, by the first way that works for it.

A part of it where the rest serves already, else all of it; in parts where there is no room for it
at once and its loaders do the same with each of them alone; and where it cannot be finished beside
the running model at all, vLLM's own reload in the pause remains. The same in a repair, without
resting.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch

from hotweights.adapters.vllm.rank import reload, room, ways
from hotweights.adapters.vllm.rank.fit.compatibility import Compatibility
from hotweights.adapters.vllm.rank.fit.delta import Delta
from hotweights.adapters.vllm.rank.image import Image
from hotweights.adapters.vllm.rank.room import NoRoom
from hotweights.adapters.vllm.rank.shadow.changes import Unsupported
from hotweights.adapters.vllm.rank.shadow.model import Shadow
from hotweights.adapters.vllm.rank.throttle import Throttle

logger = logging.getLogger("vllm.hotweights.preparer")
SHORT = 19  # characters of a digest: "sha256:" and twelve digits are enough to find it


class Abandoned(Exception):
    """Getting ready was called off: the version was released, or the engine needs the shadow for a
    repair.
    """


class Indivisible(Exception):
    """A version cannot be loaded part by part; the message says why."""


class Preparer:
    """The second model of a rank, and what it knows of versions. Built on the worker's main thread;
    used by one thread at a time, which `Versions` sees to.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        vllm_config: Any,
        device: torch.device,
        share: float,
        image_of: Callable[[str], Image],
    ) -> None:
        """``share``: of the time, that getting ready may work (`Throttle`). ``image_of`` gives a
        version's youngest image: a way that kept one would keep the memory of an agent that has
        gone.
        """
        self._model = model
        self._config = vllm_config
        self._device = device
        self._share = share
        self._image_of = image_of
        self._unfinishable: set[str] = set()  # versions that only vLLM's own reload can load
        self._indivisible: set[str] = set()  # versions that are not loaded part by part
        self._stream = (
            None if device.type == "cpu" else torch.get_device_module(device).Stream(device)
        )
        self.shadow = self._build_shadow()
        # A skeleton of its own: asking what fits must not disturb a version that is ready to be
        # committed.
        self.compatibility = Compatibility(
            vllm_config, self._build_shadow() if self.shadow is not None else None
        )

    def _build_shadow(self) -> Shadow | None:
        try:
            return Shadow(self._model, self._config, self._device)
        except Exception as error:  # noqa: BLE001 - any model's constructor may raise anything; then the plain way remains
            logger.warning(
                "No second model beside this one (%s): versions are loaded inside the pause", error
            )
            return None

    def keep_only(self, digests: Collection[str]) -> None:
        """Forget what was found out about other versions."""
        self.compatibility.keep_only(digests)
        self._unfinishable &= set(digests)
        self._indivisible &= set(digests)

    def clear(self) -> None:
        """Let go of what was loaded."""
        if self.shadow is not None:
            self.shadow.clear()

    def prepare(
        self,
        image: Image,
        served: Image | None,
        wish: ways.Wish,
        called_off: Callable[[], bool],
    ) -> ways.Way:
        """Get a checked version ready. ``served`` is what the model holds; None: that is not known.
        Raises `Abandoned`, `NoRoom`, as `Shadow.load`, and whatever a model's loaders raise.
        """
        throttle = Throttle(self._share)

        def breathe() -> None:
            if called_off():
                raise Abandoned(image.digest)
            throttle()

        with self._stream_of_its_own():
            return self._way_for(image, served, wish, breathe, throttle)

    def _way_for(
        self,
        image: Image,
        served: Image | None,
        wish: ways.Wish,
        breathe: Callable[[], None],
        throttle: Throttle,
    ) -> ways.Way:
        shadow = self.shadow
        if shadow is None or image.digest in self._unfinishable:
            return self._to_reload(image)
        attempt = partial(self._try, shadow, image, wish=wish, breathe=breathe, throttle=throttle)
        part = self.compatibility.delta(image, served)
        if part is not None:
            logger.info(
                "%s differs from what serves in %d of %d parts of the model",
                image.digest[:SHORT],
                len(part.groups),
                len(set(shadow.groups().values())),
            )
            try:
                return attempt(part)
            except (Abandoned, NoRoom, torch.OutOfMemoryError):
                raise
            # any model's loader may refuse a part of a checkpoint, which it never gets otherwise
            except Exception as error:  # noqa: BLE001
                logger.warning(
                    "Cannot load a part of %s by itself (%s): all of it is loaded",
                    image.digest[:SHORT],
                    error,
                )
        try:
            return self._whole_way(image, attempt)
        except Unsupported as error:
            logger.warning(
                "Cannot finish %s beside the model (%s): it is loaded inside the pause",
                image.digest[:SHORT],
                error,
            )
        self._unfinishable.add(image.digest)
        return self._to_reload(image)

    def _whole_way(self, image: Image, attempt: Callable[[Delta | None], ways.Way]) -> ways.Way:
        """In parts where they are needed, unless its loaders cannot be given parts."""
        try:
            return attempt(None)
        except Indivisible as error:
            logger.warning("Cannot load %s in parts: %s", image.digest[:SHORT], error)
        self._indivisible.add(image.digest)
        return attempt(None)

    def _try(
        self,
        shadow: Shadow,
        image: Image,
        part: Delta | None,
        *,
        wish: ways.Wish,
        breathe: Callable[[], None],
        throttle: Throttle,
    ) -> ways.Way:
        """Raises as `Shadow.load`, and `NoRoom`."""
        load = partial(self._load, shadow, image.digest)
        if part is not None and not part.groups:
            load(part, pause=breathe)  # the model has it already
            return ways.Beside(shadow)
        parts = () if image.digest in self._indivisible else self.compatibility.parts(image, part)
        needs = ways.Needs(
            shadow.nbytes(None if part is None else part.groups),
            max((shadow.nbytes(one.groups) for one in parts), default=0),
        )
        way = ways.choose(wish, needs, room.measure(self._device), bool(parts))
        # asked before any is loaded: `InPause` measures how long loading takes
        for one in parts if way in ("Host", "InPause") else filter(None, (part,)):
            breathe()
            self._check_alone(image, one)
        if way == "Host":
            return ways.Host(shadow, parts, partial(load, pause=breathe))
        if way == "InPause":
            return ways.InPause(
                shadow,
                parts,
                load,
                wish.max_pause_seconds,
                breathe,
                lambda: throttle.rested_seconds,
                lambda: room.measure(self._device),
            )
        load(part, pause=breathe)
        return ways.Beside(shadow)

    def _load(
        self, shadow: Shadow, digest: str, part: Delta | None, pause: Callable[[], None]
    ) -> None:
        image = self._image_of(digest)
        shadow.load(
            self.compatibility.tensors(image, None if part is None else part.tensors),
            self.compatibility.filled(image.digest),
            pause,
            proven=self.compatibility.proven,
            groups=None if part is None else part.groups,
        )

    def _check_alone(self, image: Image, part: Delta) -> None:
        if not self.compatibility.stands_alone(image, part):
            raise Indivisible("its loaders do something else where tensors are missing")

    @contextlib.contextmanager
    def _stream_of_its_own(self) -> Iterator[None]:
        """On a GPU, what this thread does waits for no step of the model and holds none up; when
        this ends, it is done, and the worker's main thread may copy it by a stream of its own.
        """
        if self._stream is None:
            yield
            return
        backend = torch.get_device_module(self._device)
        backend.set_device(self._device)  # each thread begins with device 0
        with backend.stream(self._stream):
            yield
            self._stream.synchronize()

    def repair(self, image: Image | None) -> None:
        """Put a whole version into the running model, in whatever state it is; None: what it
        booted. Beside the model if there is room and that works, part by part if it has parts, else
        in place. The model is paused. Raises what vLLM's own reload raises.
        """
        shadow = self.shadow
        if shadow is not None:
            try:
                self._install_whole(shadow, image)
            # any loader may raise anything, and memory may run out: the reload needs less of it
            except Exception as error:  # noqa: BLE001
                logger.warning(
                    "Repairing by vLLM's own reload: %s: %s", type(error).__name__, error
                )
            else:
                return
            finally:
                shadow.clear()
        reload.reload(self._model, self._config, self._whole(image))

    def _install_whole(self, shadow: Shadow, image: Image | None) -> None:
        there = room.measure(self._device)
        parts = () if image is None else self.compatibility.parts(image, None)
        if (
            parts
            and there.with_overhead(shadow.nbytes()) > there.device_nbytes
            and image is not None
        ):
            for part in parts:
                self._check_alone(image, part)
            for part in parts:
                self._load(shadow, image.digest, part, ways.go_on)
                shadow.install()
                shadow.clear()
            return
        there.check(shadow.nbytes())
        filled = self.compatibility.filled(None if image is None else image.digest)
        shadow.load(self._whole(image), filled, ways.go_on)
        shadow.install()

    def _whole(self, image: Image | None) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a held version; None: those that the engine booted from."""
        if image is None:
            return iter(reload.boot_tensors(self._model, self._config))
        return self.compatibility.tensors(image)

    def _to_reload(self, image: Image) -> ways.Reload:
        image.populate()  # nothing has read it, and the pause will
        return ways.Reload(partial(self._reload, image.digest))

    def _reload(self, digest: str) -> int:
        image = self._image_of(digest)
        reload.reload(self._model, self._config, self.compatibility.tensors(image))
        return image.nbytes
