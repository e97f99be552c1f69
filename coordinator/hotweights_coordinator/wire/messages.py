"""What passes over the coordinator's wire: one JSON frame, and at most one document beside it, which
goes to a coordinator in pieces.

Everything that arrives is checked here before anybody acts on it; what is not a request becomes a
`CallRefused`, which travels back as an error answer. The same class is what a client raises when it
gets one. Sockets, and who may ask, are not known here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Final, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json, to_json

from hotweights_common.errors import HotweightsError
from hotweights_common.reasons import Reason

WIRE_VERSION: Final = 1  # another one is refused: client and coordinator are of one release
# of one frame to a coordinator: what is not yet authenticated may make it hold so much. What is
# large goes beside it, in pieces
MAX_JSON_NBYTES = 128 << 10
MAX_BINARY_NBYTES = 512 << 20  # a plan, or a manifest, which the coordinator holds in memory

# bounds of what others send, because it is kept, written and told
WorkerId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}$")]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1, max_length=128)]
Text = Annotated[str, Field(max_length=4096)]
MAX_NUMBER = 2**53 - 1  # what every JSON reader takes exactly, and others can add to
Token = Annotated[int, Field(ge=0, le=MAX_NUMBER)]


class CoordinatorError(HotweightsError):
    """Something between here and the coordinator went wrong."""

    reason = Reason.COORDINATOR_ERROR


class CallRefused(CoordinatorError):
    """The coordinator's no: ``reason`` is one CamelCase word, ``leader`` the endpoint that would
    know better.
    """

    def __init__(self, reason: str, message: str, leader: str | None = None) -> None:
        super().__init__(message, reason)
        self.leader = leader


class CoordinatorUnreachable(CoordinatorError):
    """No coordinator answered in time; whether the call was carried out is not known."""

    reason = Reason.COORDINATOR_UNREACHABLE


class Request(BaseModel):
    """What is asked; the class says what ``args`` may hold."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    method: ClassVar[str]
    reads: ClassVar[bool] = False
    """A follower may answer it too."""
    binary: ClassVar[bool] = False
    """A document comes with it."""


class Applied(BaseModel):
    """Which version serves at a worker, and by which token's decision."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    digest: Digest
    token: Token


class Failure(BaseModel):
    """Why a worker cannot take part in an attempt. Without a token it is about whatever is open."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    reason: Annotated[str, Field(pattern=r"^[A-Za-z0-9]{1,64}$")]
    message: Text = ""
    token: Token | None = None


# as many as an agent's status lists (`MAX_STAGED`)
Have = Annotated[tuple[Digest, ...], Field(max_length=256)]


class Register(Request):
    method = "register"
    worker_id: WorkerId
    host: Annotated[str, Field(max_length=255)] = ""
    endpoints: Annotated[
        tuple[Annotated[str, Field(max_length=256)], ...], Field(max_length=16)
    ] = ()
    zone: Annotated[str, Field(max_length=128)] = ""
    have: Have = ()
    instance: Annotated[str, Field(max_length=128)] = ""


class Heartbeat(Request):
    method = "heartbeat"
    worker_id: WorkerId
    have: Have | None = None
    applied: Applied | None = None
    failure: Failure | None = None
    # connected to this worker; None: it does not say. Without any it precommits and applies by
    # memory alone
    engines: Annotated[int, Field(ge=0, le=MAX_NUMBER)] | None = None


class Leave(Request):
    method = "leave"
    worker_id: WorkerId


class SubmitPlan(Request):
    method = "submit_plan"
    binary = True


class GetPlan(Request):
    method = "get_plan"
    reads = True
    digest: Digest | None = None


class Begin(Request):
    method = "begin"
    version: Name
    digest: Digest | None = None
    # an hour unless given, and a week at most: an attempt that stays open keeps all others out
    deadline_seconds: Annotated[float, Field(gt=0, le=7 * 86400, allow_inf_nan=False)] = 3600.0
    commit_when_ready: bool = False


class Precommit(Request):
    method = "precommit"
    worker_id: WorkerId
    token: Token


class Commit(Request):
    method = "commit"
    version: Name
    token: Token | None = None


class Abort(Request):
    method = "abort"
    reason: Text = "by an operator"
    token: Token | None = None


class AppliedCall(Request):
    method = "applied"
    worker_id: WorkerId
    version: Name
    digest: Digest
    token: Token


class WhoHas(Request):
    method = "who_has"
    digest: Digest


class ListWorkers(Request):
    method = "list_workers"
    reads = True


class Status(Request):
    method = "status"
    reads = True


class SetCurrentManifest(Request):
    method = "set_current_manifest"
    binary = True


class GetCurrentManifest(Request):
    method = "get_current_manifest"
    reads = True


METHODS: Final[Mapping[str, type[Request]]] = {
    kind.method: kind
    for kind in (
        *(
            Register,
            Heartbeat,
            Leave,
            SubmitPlan,
            GetPlan,
            Begin,
            Precommit,
            Commit,
            Abort,
            AppliedCall,
        ),
        *(WhoHas, ListWorkers, Status, SetCurrentManifest, GetCurrentManifest),
    )
}


@dataclass(frozen=True, slots=True)
class Call:
    """A request as it came: ``call_id`` is None where not even that could be read."""

    call_id: int | None
    method: str
    args: dict[str, Any]
    secret: str


def request_frames(
    call_id: int,
    method: str,
    args: Mapping[str, Any],
    secret: str,
    binary: bytes | memoryview | None,
) -> list[bytes | memoryview]:
    """The frames that a client sends: the call, then what goes beside it in pieces. Raises `CallRefused` where they are too large."""
    body = {"v": WIRE_VERSION, "id": call_id, "method": method, "args": dict(args)} | (
        {"token": secret} if secret else {}
    )
    encoded = json.dumps(body, separators=(",", ":")).encode()
    if len(encoded) > MAX_JSON_NBYTES:
        raise CallRefused(
            Reason.TOO_LARGE,
            f"the call {method} has {len(encoded)} bytes; {MAX_JSON_NBYTES} is the most",
        )
    if binary is not None and len(binary) > MAX_BINARY_NBYTES:
        raise CallRefused(
            Reason.TOO_LARGE,
            f"{len(binary)} bytes come with {method}; {MAX_BINARY_NBYTES} is the most",
        )
    if binary is None:
        return [encoded]
    view = memoryview(binary)
    begins = range(0, len(view), MAX_JSON_NBYTES) or range(1)  # an empty one is one piece too
    return [encoded, *(view[begin : begin + MAX_JSON_NBYTES] for begin in begins)]


def parse_call(frame: bytes) -> Call:
    """The outer part of a request. Raises `CallRefused`."""
    if len(frame) > MAX_JSON_NBYTES:
        raise CallRefused(
            Reason.TOO_LARGE, f"a request has {len(frame)} bytes; {MAX_JSON_NBYTES} is the most"
        )
    try:
        body = json_value(frame)
    except (ValueError, RecursionError):
        raise CallRefused(
            Reason.BAD_REQUEST,
            "a request is one frame of JSON, and after it what goes beside it",
        ) from None
    if not isinstance(body, dict):
        raise CallRefused(Reason.BAD_REQUEST, "a request is a JSON object")
    call_id, args, secret = body.get("id"), body.get("args", {}), body.get("token", "")
    if body.get("v") != WIRE_VERSION:
        what = (
            f"the request speaks version {str(body.get('v'))[:20]}, this coordinator {WIRE_VERSION}"
        )
        raise CallRefused(
            Reason.WRONG_VERSION, f"{what}; use client and coordinator of one release"
        )
    if not _is_call_id(call_id):
        raise CallRefused(
            Reason.BAD_REQUEST, f"a request's id is an integer between 0 and {MAX_NUMBER}"
        )
    if (
        not isinstance(body.get("method"), str)
        or not isinstance(args, dict)
        or not isinstance(secret, str)
    ):
        raise CallRefused(
            Reason.BAD_REQUEST,
            "a request has a method (text), args (an object) and maybe a token (text)",
        )
    return Call(call_id, body["method"], args, secret)


def call_id_of(frame: bytes) -> int | None:
    """The id of what could not be parsed, so that its sender recognises the answer."""
    try:
        call_id = json_value(frame).get("id") if len(frame) <= MAX_JSON_NBYTES else None
    except (ValueError, RecursionError, AttributeError):
        return None
    return call_id if _is_call_id(call_id) else None


def _is_call_id(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= MAX_NUMBER


def parse_request(call: Call, has_binary: bool) -> Request:
    """The inner part: what is asked, with every argument checked. Raises `CallRefused`."""
    kind = METHODS.get(call.method)
    if kind is None:
        raise CallRefused(
            Reason.UNKNOWN_METHOD,
            f"there is no method {call.method[:64]!r}; there are {', '.join(METHODS)}",
        )
    if kind.binary != has_binary:
        what = "needs a plan or manifest beside it" if kind.binary else "takes nothing beside it"
        raise CallRefused(Reason.BAD_REQUEST, f"{call.method} {what}")
    try:
        return kind.model_validate(call.args)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CallRefused(
            Reason.BAD_REQUEST, f"{call.method}: {where or 'args'}: {first['msg']}"
        ) from None


def answer_frame(call_id: int | None, result: Mapping[str, Any]) -> bytes:
    return json_bytes({"v": WIRE_VERSION, "id": call_id, "ok": True, "result": result})


def error_frame(call_id: int | None, error: CallRefused) -> bytes:
    body: dict[str, Any] = {"reason": error.reason, "message": str(error)}
    if error.leader is not None:
        body["leader"] = error.leader
    return json_bytes({"v": WIRE_VERSION, "id": call_id, "ok": False, "error": body})


def json_value(text: bytes) -> Any:
    """What JSON says, in a fifth of the standard library's time. That one is asked where a text is
    not Unicode: a path or a token need not be. Raises ValueError or RecursionError.
    """
    try:
        return from_json(text)
    except ValueError:
        return json.loads(text)


def json_bytes(value: Any) -> bytes:
    """Dicts, sequences and dataclasses as JSON, likewise."""
    try:
        return to_json(value)
    except ValueError:
        return json.dumps(value, separators=(",", ":"), default=asdict).encode()


@dataclass(frozen=True, slots=True)
class Answer:
    call_id: int | None
    result: dict[str, Any]
    error: CallRefused | None
    binary: bytes | None


def parse_answer(frames: Sequence[bytes]) -> Answer | None:
    """What a coordinator answered; None: these frames are no answer."""
    try:
        body = json_value(frames[0])
        call_id, error = body.get("id"), body.get("error")
        binary = frames[1] if len(frames) > 1 else None
        if body["ok"] is True and isinstance(body["result"], dict):
            return Answer(call_id, body["result"], None, binary)
        refused = CallRefused(str(error["reason"]), str(error["message"]), error.get("leader"))
        return Answer(call_id, {}, refused, None)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError):
        return None
