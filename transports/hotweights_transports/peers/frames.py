"""Frames between a puller and a server of chunks, as bytes; and everything that may be wrong about
them.

A frame is a header of 40 bytes, then `nbytes` of payload: ``"HW" kind(1) 0(1) nbytes(4, big-endian)
blake3(32)``. The header of a chunk carries its digest, every other one zeros. Requests and refusals
are small JSON objects; a chunk and a manifest are their plain bytes.

This module is pure: no socket, no clock. It refuses to allocate or to parse anything before its
size was held against `MAX_NBYTES`, and turns whatever bytes it is given either into a frame or into
a `FrameError`, never into anything else.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import struct

PROTOCOLS = (1,)
HEADER = struct.Struct("!2sBxI32s")
MAGIC = b"HW"
NO_DIGEST = bytes(32)  # as long as a BLAKE3 digest
MAX_REQUESTED_CHUNKS = 512  # 34 KiB of JSON, within the 64 KiB of their frame
MAX_QUESTION_CHARS = 128  # as long as the name of a job in NodeWeights may be
MAX_ENDPOINT_CHARS = 256  # as long as an endpoint in NodeWeights may be
NONCE_NBYTES = 32  # nobody meets the same one twice
MAX_SIGNATURE_NBYTES = 128  # Ed25519 makes 64

_VERSION_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_CHUNK_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NONCE = re.compile(rf"[0-9a-f]{{{2 * NONCE_NBYTES}}}", re.ASCII)
_SIGNATURE = re.compile(rf"(?:[0-9a-f]{{2}}){{1,{MAX_SIGNATURE_NBYTES}}}", re.ASCII)


class FrameError(ValueError):
    """Bytes that are no frame, or one that has no place here."""


class Kind(enum.IntEnum):
    HELLO = 1  # puller → server, first: {protocols, token}
    MANIFEST = 2  # puller → server: {digest}
    CHUNKS = 3  # puller → server: {digest, blake3: […]}
    # both ways after the welcome, where chunks come another way: what that transport wants to know
    GREETING = 4
    QUESTION = 5  # puller → server: {name}
    # puller → server, before the hello, where the route names the server's key: {nonce, endpoint}
    CHALLENGE = 6
    WELCOME = 16  # server → puller: {protocol}
    REFUSED = 17  # server → puller, and closes: {reason, message}
    CHUNK = 18  # server → puller: the bytes
    MISSING = 19  # server → puller: the version is known here, that chunk is not
    UNKNOWN = 20  # server → puller: the version is not known here (yet)
    WAITING = 21  # server → puller: a sign of life while that chunk is on its way to the server
    MANIFEST_BYTES = 22  # server → puller
    ANSWER = 23  # server → puller: bytes, whatever they mean to the two
    PROOF = 24  # server → puller: {signature}


FROM_STRANGER = frozenset({Kind.CHALLENGE, Kind.HELLO})
FROM_CHALLENGER = frozenset({Kind.HELLO})  # one proof a connection
FROM_PULLER = frozenset({Kind.MANIFEST, Kind.CHUNKS, Kind.QUESTION})
GREETINGS = frozenset({Kind.GREETING})
TO_CHALLENGER = frozenset({Kind.PROOF, Kind.REFUSED})
TO_STRANGER = frozenset({Kind.WELCOME, Kind.REFUSED})
TO_GREETED = frozenset({Kind.GREETING, Kind.REFUSED})
TO_PULLER = frozenset(
    {
        Kind.REFUSED,
        Kind.CHUNK,
        Kind.MISSING,
        Kind.UNKNOWN,
        Kind.WAITING,
        Kind.MANIFEST_BYTES,
        Kind.ANSWER,
    }
)

MAX_NBYTES = {
    Kind.HELLO: 32 * 1024,  # a service-account token takes one or two KiB
    Kind.MANIFEST: 1024,
    Kind.CHUNKS: 64 * 1024,
    # the address of a UCX worker on a host with many networks has a few KiB
    Kind.GREETING: 16 * 1024,
    Kind.QUESTION: 1024,
    Kind.CHALLENGE: 2048,  # an endpoint of 256 characters, as JSON may write them, and a nonce
    Kind.WELCOME: 1024,
    Kind.REFUSED: 4096,
    # the most that a manifest may make of one chunk; the usual is 4 MiB
    Kind.CHUNK: 1024 * 1024 * 1024,
    Kind.MISSING: 0,
    Kind.UNKNOWN: 0,
    Kind.WAITING: 0,
    # what the planner's own `MAX_MANIFEST_NBYTES` says; who asks for one may say less
    Kind.MANIFEST_BYTES: 512 * 1024 * 1024,
    Kind.ANSWER: 32 * 1024,  # a token is in it
    Kind.PROOF: 1024,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """A frame's first 40 bytes; `nbytes` of payload follow."""

    kind: Kind
    nbytes: int
    blake3: bytes = NO_DIGEST

    def encode(self) -> bytes:
        return HEADER.pack(MAGIC, self.kind, self.nbytes, self.blake3)


@dataclasses.dataclass(frozen=True, slots=True)
class Hello:
    protocols: tuple[int, ...]
    token: str = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Challenge:
    """What a puller wants signed before it says who it is."""

    nonce: bytes
    endpoint: str
    """The URI that it dialled."""


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """Why a server does not talk to a puller: a CamelCase word, and a sentence."""

    reason: str
    message: str


def decode_header(data: bytes | bytearray | memoryview, allowed: frozenset[Kind]) -> Header:
    """The header that `data` is. Raises `FrameError` for anything but one of a kind in `allowed`
    with a payload that is not too large.
    """
    if len(data) != HEADER.size:
        raise FrameError(f"a header has {HEADER.size} bytes, not {len(data)}")
    magic, number, nbytes, blake3 = HEADER.unpack(data)
    if magic != MAGIC:
        raise FrameError("this is no Hotweights peer")
    if number not in _KINDS:
        raise FrameError(f"unknown frame kind {number}")
    kind = _KINDS[number]
    if kind not in allowed:
        raise FrameError(f"a {kind.name} frame has no place here")
    if nbytes > MAX_NBYTES[kind]:
        raise FrameError(f"a {kind.name} frame of {nbytes} bytes; at most {MAX_NBYTES[kind]}")
    return Header(kind, nbytes, blake3)


_KINDS = {int(kind): kind for kind in Kind}


def hello(token: str) -> bytes:
    return _json(Kind.HELLO, {"protocols": list(PROTOCOLS), "token": token})


def challenge(nonce: bytes, endpoint: str) -> bytes:
    return _json(Kind.CHALLENGE, {"nonce": nonce.hex(), "endpoint": endpoint})


def proof(signature: bytes) -> bytes:
    return _json(Kind.PROOF, {"signature": signature.hex()})


def welcome(protocol: int) -> bytes:
    return _json(Kind.WELCOME, {"protocol": protocol})


def refused(reason: str, message: str) -> bytes:
    message = message[:400]
    while True:
        try:
            return _json(Kind.REFUSED, {"reason": reason[:100], "message": message})
        except FrameError:  # JSON writes some characters in twelve bytes
            message = message[: len(message) // 2]


def manifest_request(digest: str) -> bytes:
    return _json(Kind.MANIFEST, {"digest": digest})


def chunks_request(digest: str, blake3: list[str]) -> bytes:
    return _json(Kind.CHUNKS, {"digest": digest, "blake3": blake3})


def question(name: str) -> bytes:
    return _json(Kind.QUESTION, {"name": name})


def read_hello(payload: bytes) -> Hello:
    data = _object(payload)
    protocols, token = data.get("protocols"), data.get("token")
    if not isinstance(protocols, list) or not all(type(number) is int for number in protocols):
        raise FrameError("hello: protocols must be a list of integers")
    if not isinstance(token, str):
        raise FrameError("hello: token must be a string")
    return Hello(tuple(protocols), token)


def read_challenge(payload: bytes) -> Challenge:
    data = _object(payload)
    nonce, endpoint = data.get("nonce"), data.get("endpoint")
    if not isinstance(nonce, str) or not _NONCE.fullmatch(nonce):
        raise FrameError(f"challenge: nonce must be {2 * NONCE_NBYTES} lowercase hex digits")
    if not isinstance(endpoint, str) or not 1 <= len(endpoint) <= MAX_ENDPOINT_CHARS:
        raise FrameError(
            f"challenge: endpoint must be a string of 1 to {MAX_ENDPOINT_CHARS} characters"
        )
    return Challenge(bytes.fromhex(nonce), endpoint)


def read_proof(payload: bytes) -> bytes:
    signature = _object(payload).get("signature")
    if not isinstance(signature, str) or not _SIGNATURE.fullmatch(signature):
        raise FrameError(
            f"proof: signature must be 1 to {MAX_SIGNATURE_NBYTES} bytes as lowercase hex digits"
        )
    return bytes.fromhex(signature)


def read_welcome(payload: bytes) -> int:
    protocol = _object(payload).get("protocol")
    if type(protocol) is not int or protocol not in PROTOCOLS:
        raise FrameError(f"welcome: protocol must be one of {PROTOCOLS}")
    return protocol


def read_refused(payload: bytes) -> Refusal:
    data = _object(payload)
    reason, message = data.get("reason"), data.get("message")
    if not isinstance(reason, str) or not isinstance(message, str):
        raise FrameError("refused: reason and message must be strings")
    return Refusal(reason[:100], message[:400])  # the other side may not have cut them


def read_manifest_request(payload: bytes) -> str:
    return _version_digest(_object(payload))


def read_chunks_request(payload: bytes) -> tuple[str, list[str]]:
    data = _object(payload)
    digest, blake3 = _version_digest(data), data.get("blake3")
    if not isinstance(blake3, list) or not 1 <= len(blake3) <= MAX_REQUESTED_CHUNKS:
        raise FrameError(f"chunks: blake3 must be a list of 1 to {MAX_REQUESTED_CHUNKS} digests")
    if not all(isinstance(item, str) and _CHUNK_DIGEST.fullmatch(item) for item in blake3):
        raise FrameError("chunks: a BLAKE3 digest is 64 lowercase hex digits")
    return digest, blake3


def read_question(payload: bytes) -> str:
    name = _object(payload).get("name")
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_QUESTION_CHARS:
        raise FrameError(f"a question is a string of 1 to {MAX_QUESTION_CHARS} characters")
    return name


def _version_digest(data: dict[str, object]) -> str:
    digest = data.get("digest")
    if not isinstance(digest, str) or not _VERSION_DIGEST.fullmatch(digest):
        raise FrameError("digest must be sha256: and 64 lowercase hex digits")
    return digest


def _json(kind: Kind, data: dict[str, object]) -> bytes:
    payload = json.dumps(data, separators=(",", ":")).encode()
    if len(payload) > MAX_NBYTES[kind]:
        raise FrameError(
            f"a {kind.name} frame would have {len(payload)} bytes; at most {MAX_NBYTES[kind]}"
        )
    return Header(kind, len(payload)).encode() + payload


def _object(payload: bytes) -> dict[str, object]:
    try:
        data = json.loads(payload)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of opening brackets
        raise FrameError("the payload is no JSON") from error
    if not isinstance(data, dict):
        raise FrameError("the payload is no JSON object")
    return data
