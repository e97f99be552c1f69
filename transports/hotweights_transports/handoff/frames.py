"""Frames between an agent and the engines of its node.

One frame is one JSON object in one datagram (`sockets` sends it), with file descriptors beside it
where it hands memory over. This module runs inside vLLM, in images that we do not build, beside
agents older or newer than itself: so it imports the standard library alone, an unknown field is
ignored, a missing one takes its default, and an unknown ``op`` is a `WireError` that the receiver
answers instead of dying of it. So is a number that cannot be meant: counts, ids and tokens are 0 to
`MAX_NUMBER`, and what is measured is finite, so that nobody behind the receiver has to doubt them.
What the frames mean, and in which order they come, is told in ``docs/design/001-contracts.md``. No
socket is known here.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

PROTOCOLS = (1,)
MAX_FRAME_BYTES = 64 * 1024  # well within a socket's buffer (208 KiB), where a datagram must fit
MAX_FDS_PER_FRAME = 250  # the kernel's SCM_MAX_FD is 253 (unix(7))
MAX_NUMBER = (
    2**53 - 1
)  # what every JSON reader takes exactly; an API server takes more, but others must be able to add to it
TOKEN_AUDIENCE = "hotweights-agent"


class WireError(Exception):
    """A frame that cannot be understood, or is too large to send."""


_FRAMES: dict[str, type[Frame]] = {}


@dataclass(frozen=True, slots=True)
class Frame:
    """What every frame has: an ``op`` (by class) and, for requests and their answers, an ``id``."""

    op: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super(Frame, cls).__init_subclass__(**kwargs)
        _FRAMES[cls.op] = cls


@dataclass(frozen=True, slots=True)
class Hello(Frame):
    """Engine → agent, first: who connects, and what it serves."""

    op: ClassVar[str] = "hello"
    protocols: list[int] = field(default_factory=lambda: list(PROTOCOLS))
    role: str = ""  # "server" (the process with vLLM's port) or "rank" (a worker)
    token: str = field(default="", repr=False)
    rank: int = 0
    world_size: int = 1
    instance: str = ""  # equal for all processes of one engine
    plugin: str = ""
    engine: str = ""
    state: str = "Booting"  # Booting | Serving | Dirty
    digest: str | None = None  # confirmed in this process's life; None: it serves what it booted
    commit_token: int = 0
    unsupported: str = ""  # why this engine can never be switched; empty: it can
    held: list[str] = field(default_factory=list)  # of a rank: versions that it maps already
    probe: str = ""  # of a server: what proved ``digest``, as in `Committed`; empty: not said
    caveat: str = ""  # of a server: what a new version leaves as it was; empty: nothing


@dataclass(frozen=True, slots=True)
class Welcome(Frame):
    op: ClassVar[str] = "welcome"
    protocol: int = 1
    agent: str = ""


@dataclass(frozen=True, slots=True)
class Refused(Frame):
    """Agent → engine: the connection is not accepted and will be closed."""

    op: ClassVar[str] = "refused"
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Prepare(Frame):
    """Agent → rank, with fds: the table, then the first slabs."""

    op: ClassVar[str] = "prepare"
    id: int = 0
    digest: str = ""
    slabs: int = 0
    memory: str = "Auto"  # Auto, or the one way by which it may be got ready (`Prepared.way`)
    max_pause_seconds: float = 0.0  # that loading inside the pause may take; 0: it may not


@dataclass(frozen=True, slots=True)
class MoreSlabs(Frame):
    """Agent → rank, with fds: further slabs of the `Prepare` with the same id; not answered by
    itself.
    """

    op: ClassVar[str] = "more_slabs"
    id: int = 0


@dataclass(frozen=True, slots=True)
class Prepared(Frame):
    op: ClassVar[str] = "prepared"
    id: int = 0
    digest: str = ""
    seconds: float = 0.0
    nbytes: int = 0
    way: str = ""  # Beside | Host | InPause | Reload; empty: it serves already, or nobody says


@dataclass(frozen=True, slots=True)
class Rejected(Frame):
    """Rank → agent: this version cannot be prepared; what is served is untouched."""

    op: ClassVar[str] = "rejected"
    id: int = 0
    digest: str = ""
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Release(Frame):
    op: ClassVar[str] = "release"
    id: int = 0
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Released(Frame):
    op: ClassVar[str] = "released"
    id: int = 0
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Commit(Frame):
    """Agent → server, once every rank has prepared."""

    op: ClassVar[str] = "commit"
    id: int = 0
    digest: str = ""
    version: str = ""
    commit_token: int = 0
    mode: str = "Keep"  # Keep | Wait | Abort: what happens to running requests
    drain_seconds: float = 30.0  # mode Wait: how long running requests may take to end
    deadline_seconds: float = 60.0  # from the pause to the resume; then the engine counts as dirty


@dataclass(frozen=True, slots=True)
class Committed(Frame):
    """Server → agent: every rank serves ``digest`` and the probe passed."""

    op: ClassVar[str] = "committed"
    id: int = 0
    digest: str = ""
    commit_token: int = 0
    pause_seconds: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)  # seconds by step
    probe: str = "None"  # Golden | Ran | None: what the probe could compare with


@dataclass(frozen=True, slots=True)
class CommitFailed(Frame):
    op: ClassVar[str] = "commit_failed"
    id: int = 0
    digest: str = ""
    commit_token: int = 0
    reason: str = ""
    message: str = ""
    dirty: bool = False  # True: the engine stays paused until it is repaired


@dataclass(frozen=True, slots=True)
class Keep(Frame):
    """Agent → server: the explicit "serve what you booted"."""

    op: ClassVar[str] = "keep"
    id: int = 0
    commit_token: int = 0


@dataclass(frozen=True, slots=True)
class Kept(Frame):
    op: ClassVar[str] = "kept"
    id: int = 0
    commit_token: int = 0


@dataclass(frozen=True, slots=True)
class State(Frame):
    """Server → agent, unasked: the engine's state changed."""

    op: ClassVar[str] = "state"
    state: str = "Serving"
    digest: str | None = None
    commit_token: int = 0
    reason: str = ""
    message: str = ""
    probe: str = ""  # what proved ``digest``, as in `Committed`; empty: not said


@dataclass(frozen=True, slots=True)
class Ping(Frame):
    op: ClassVar[str] = "ping"
    id: int = 0


@dataclass(frozen=True, slots=True)
class Pong(Frame):
    op: ClassVar[str] = "pong"
    id: int = 0


def encode(frame: Frame) -> bytes:
    """The datagram of a frame. Raises `WireError` when it would exceed `MAX_FRAME_BYTES`."""
    data = json.dumps({"op": frame.op, **dataclasses.asdict(frame)}, separators=(",", ":")).encode()
    if len(data) > MAX_FRAME_BYTES:
        raise WireError(f"a {frame.op} frame of {len(data)} bytes exceeds {MAX_FRAME_BYTES}")
    return data


def decode(data: bytes) -> Frame:
    """The frame of a datagram. Raises `WireError` naming what is wrong with it, and nothing else,
    whatever the bytes are.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WireError(f"not a JSON frame: {error}") from error
    if not isinstance(body, dict):
        raise WireError("a frame is a JSON object")
    cls = _FRAMES.get(str(body.get("op")))
    if cls is None or not cls.op:
        raise WireError(f"unknown op {body.get('op')!r}")
    values = {f.name: body[f.name] for f in dataclasses.fields(cls) if f.name in body}
    for f in dataclasses.fields(cls):
        if f.name in values and not _fits(values[f.name], str(f.type)):
            raise WireError(f"{cls.op}.{f.name} is no {f.type}")
    return cls(**values)


def _fits(value: object, annotation: str) -> bool:
    """Whether a JSON value has the type that a field declares (ints pass for floats, bools never
    for ints).
    """
    if annotation.endswith(" | None"):
        return value is None or _fits(value, annotation.removesuffix(" | None"))
    if annotation == "bool":
        return isinstance(value, bool)
    if annotation == "int":
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_NUMBER
    if annotation == "float":  # NaN is not between anything
        return (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and abs(value) <= MAX_NUMBER
        )
    if annotation == "str":
        return isinstance(value, str)
    if annotation.startswith("list["):
        item = annotation.removeprefix("list[").removesuffix("]")
        return isinstance(value, list) and all(_fits(v, item) for v in value)
    if annotation.startswith("dict[str, float]"):
        return isinstance(value, dict) and all(
            isinstance(k, str) and _fits(v, "float") for k, v in value.items()
        )
    return False
