"""How a prepared version waits for its commit, and what the pause then costs. Chosen by what memory
there is, before the first byte is taken (`choose`).

Beside
    finished on the device: the pause copies within it.
Host
    finished on the device part by part, each then in page-locked memory of the host: the pause
    copies over the link. Only where the device has memory of its own.
InPause
    loaded and finished in the pause, part by part; the pause is as long as that takes. What is to
    be done then was done once before, beside the running model, and let go: so it is known to work,
    and how long it takes.
Reload
    vLLM's own reload in the pause, for models that cannot be finished beside the running one.

A part is what is finished by itself (`delta`), a decoder layer for instance. Whatever the way, the
running model is touched by `install` alone, inside the pause.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hotweights.adapters.vllm.rank import page_locked
from hotweights.adapters.vllm.rank.fit.delta import Delta
from hotweights.adapters.vllm.rank.room import RESERVE_NBYTES, NoRoom, Room, gib
from hotweights.adapters.vllm.rank.shadow.model import Shadow

AUTO = "Auto"


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that a version takes before it is finished: whole, and its largest part."""

    nbytes: int
    part_nbytes: int


@dataclass(frozen=True, slots=True)
class Wish:
    """What a rollout allows: ``Auto`` or one way, and how long a pause may be."""

    way: str = AUTO
    max_pause_seconds: float = 0.0
    """0: no pause is allowed that loads (`InPause`)."""


def choose(wish: Wish, needs: Needs, room: Room, parts: bool) -> str:
    """The way: the one with the shortest pause that fits. ``parts``: the model has any. Raises
    `NoRoom`, which says what each way that is allowed needs, what there is, and the remedy.
    """
    copy, part = room.with_overhead(needs.nbytes), room.with_overhead(needs.part_nbytes)
    # in the order of their pauses: whether it fits, and what it needs
    possible = {"Beside": (copy <= room.device_nbytes, f"a second copy needs {gib(copy)}")}
    if parts and room.host_nbytes is not None:
        possible["Host"] = (
            part <= room.device_nbytes and needs.nbytes + RESERVE_NBYTES <= room.host_nbytes,
            f"Host needs {gib(part)} there, and {gib(needs.nbytes + RESERVE_NBYTES)} of the "
            f"{gib(room.host_nbytes)} that the host has",
        )
    if parts and wish.max_pause_seconds > 0:
        fits = part <= room.device_nbytes
        possible["InPause"] = (fits, f"loading in the pause needs {gib(part)}")
    allowed = {w: told for w, told in possible.items() if wish.way in (AUTO, w)}
    for way, (fits, _) in allowed.items():
        if fits:
            return way
    if not allowed:
        raise NoRoom(f"{wish.way} is no way here: {_why_not(wish.way, parts)}")
    told = ", ".join(text for _, text in allowed.values())
    less = "" if "InPause" in allowed or wish.way != AUTO else _LESS
    raise NoRoom(
        f"{gib(max(room.device_nbytes, 0))} are free {room.where}, and {told}: {room.remedy}{less}; "
        "what is served stays"
    )


_LESS = ", or allow a longer pause by spec.activation.maxPauseSeconds"


def _why_not(way: str, parts: bool) -> str:
    if not parts:
        return "this model cannot be finished part by part"
    if way == "InPause":
        return "spec.activation.maxPauseSeconds says how long the pause may be, and is not set"
    return "this device has no memory but the host's"


class Way(Protocol):
    """A version that is ready. `drop` may be called at any time, and again."""

    name: str
    pause_seconds: float | None
    """How long its part of the pause was when it was tried; None: not known."""

    def check(self) -> None:
        """Before anything is touched: raise `NoRoom` if there is not the room any more that
        `install` takes.
        """
        ...

    def install(self) -> int:
        """Put it into the running model, which is paused. Gives bytes copied; on a GPU they are
        under way until the caller synchronizes. On an exception the model is dirty.
        """
        ...

    def drop(self) -> None:
        """Let its memory go."""
        ...


class Beside:
    """The shadow holds it, finished."""

    name = "Beside"
    pause_seconds: float | None = None

    def __init__(self, shadow: Shadow) -> None:
        self._shadow = shadow

    def check(self) -> None:
        """It takes none."""

    def install(self) -> int:
        nbytes: int = self._shadow.install()
        return nbytes

    def drop(self) -> None:
        self._shadow.clear()


class Host:
    """Finished, in page-locked memory."""

    name = "Host"
    pause_seconds: float | None = None

    def __init__(self, shadow: Shadow, parts: Sequence[Delta], load: Load) -> None:
        """Finish part by part. Raises what ``load`` raises; nothing is kept then."""
        self._moves: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._values: list[tuple[torch.nn.Module, str, Any]] = []
        try:
            for part in parts:
                load(part)
                olds = [old for _, old, _ in shadow.moves]
                news = page_locked.copies([new for _, _, new in shadow.moves])
                self._moves += zip(olds, news, strict=True)
                self._values += shadow.values
                shadow.clear()
        finally:
            shadow.clear()

    def check(self) -> None:
        """It takes none."""

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def install(self) -> int:
        for old, new in self._moves:
            old.copy_(new, non_blocking=True)
        for module, name, value in self._values:
            setattr(module, name, value)
        return sum(new.nbytes for _, new in self._moves)

    def drop(self) -> None:
        self._moves, self._values = [], []


class InPause:
    """It is loaded when it is installed. It was before, part by part: what a loader refuses, it
    refused then.
    """

    name = "InPause"
    pause_seconds: float | None

    def __init__(
        self,
        shadow: Shadow,
        parts: Sequence[Delta],
        load: LoadPausing,
        max_pause_seconds: float,
        breathe: Callable[[], None],
        rested: Callable[[], float],
        measure: Callable[[], Room],
    ) -> None:
        """``measure`` says what is free, and ``rested`` gives seconds that ``breathe`` has rested
        until now, which nothing does in the pause. Raises what ``load`` raises, and `NoRoom` where
        the pause would be too long.
        """
        self._shadow, self._load, self._measure = shadow, load, measure
        self._parts: list[Delta] = []
        self._part_nbytes = max((shadow.nbytes(part.groups) for part in parts), default=0)
        began, before = time.monotonic(), rested()
        try:
            for part in parts:
                load(part, breathe)
                if shadow.moves or shadow.values:
                    self._parts.append(part)
                shadow.clear()
        finally:
            shadow.clear()
        self.pause_seconds = time.monotonic() - began - (rested() - before)
        if self.pause_seconds > max_pause_seconds:
            raise NoRoom(
                f"there is only room to load the version inside the pause, which took "
                f"{self.pause_seconds:.2f} s when it was tried and may take {max_pause_seconds:g} s "
                "(activation.maxPauseSeconds): allow so much, or give more memory; what is served "
                "stays"
            )

    def check(self) -> None:
        there, needed = self._measure(), Room.with_overhead(self._part_nbytes)
        if self._parts and needed > there.device_nbytes:
            raise NoRoom(
                f"loading in the pause needs {gib(needed)}, and by now only "
                f"{gib(max(there.device_nbytes, 0))} are free {there.where}: {there.remedy}"
            )

    def install(self) -> int:
        nbytes = 0
        try:
            for part in self._parts:
                self._load(part, go_on)
                nbytes += self._shadow.install()
                self._shadow.clear()
        finally:
            self._shadow.clear()
        return nbytes

    def drop(self) -> None:
        self._parts = []


class Reload:
    """vLLM reads it in the pause."""

    name = "Reload"
    pause_seconds: float | None = None

    def __init__(self, reload: Callable[[], int]) -> None:
        self._reload = reload

    def check(self) -> None:
        """vLLM takes what it takes."""

    def install(self) -> int:
        return self._reload()

    def drop(self) -> None:
        """It has none."""


Load = Callable[[Delta], object]
"""Has the shadow hold a part, finished."""
LoadPausing = Callable[[Delta, Callable[[], None]], object]
"""The same; calls what it is given between small steps."""


def go_on() -> None:
    """No rest: the model is paused."""
