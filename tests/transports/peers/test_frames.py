"""Whatever bytes come: a frame or a `FrameError`, and nothing is parsed that is larger than its
kind allows.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotweights_transports.peers import frames
from hotweights_transports.peers.frames import HEADER, MAGIC, FrameError, Header, Kind

RELAXED = settings(max_examples=50)

DIGEST = "sha256:" + "a" * 64
CHUNK = "0123456789abcdef" * 4
READERS: list[Callable[[bytes], object]] = [
    frames.read_hello,
    frames.read_challenge,
    frames.read_proof,
    frames.read_welcome,
    frames.read_refused,
    frames.read_manifest_request,
    frames.read_chunks_request,
]

scalars = st.sampled_from([None, True, 0, 1, -1, 2**70, 1.5, "", "x", DIGEST, CHUNK, {}, {"a": 1}])
fields = st.sampled_from(
    [
        *("protocols", "token", "protocol", "reason", "message", "digest", "blake3"),
        *("nonce", "endpoint", "signature"),
    ]
)


@RELAXED
@given(st.binary(max_size=60), st.frozensets(st.sampled_from(Kind)))
def test_any_bytes_as_a_header(data: bytes, allowed: frozenset[Kind]) -> None:
    try:
        header = frames.decode_header(data, allowed)
    except FrameError:
        return
    assert header.kind in allowed
    assert header.nbytes <= frames.MAX_NBYTES[header.kind]


@RELAXED
@given(st.sampled_from(Kind), st.integers(0, 2**32 - 1), st.binary(min_size=32, max_size=32))
def test_headers_round_trip_within_bounds(kind: Kind, nbytes: int, blake3: bytes) -> None:
    header = Header(kind, nbytes, blake3)
    if nbytes <= frames.MAX_NBYTES[kind]:
        assert frames.decode_header(header.encode(), frozenset(Kind)) == header
        return
    with pytest.raises(FrameError, match="at most"):
        frames.decode_header(header.encode(), frozenset(Kind))


@pytest.mark.parametrize("read", READERS)
@RELAXED
@given(st.binary(max_size=200))
def test_any_bytes_as_a_payload(read: Callable[[bytes], object], data: bytes) -> None:
    with pytest.raises(FrameError):
        read(data)


@pytest.mark.parametrize("read", READERS)
@RELAXED
@given(st.dictionaries(fields, scalars | st.lists(scalars, max_size=3), max_size=4))
def test_any_json_as_a_payload(read: Callable[[bytes], object], data: dict[str, object]) -> None:
    try:
        read(json.dumps(data).encode())
    except FrameError:
        return


@pytest.mark.parametrize("read", READERS)
def test_thousands_of_brackets(read: Callable[[bytes], object]) -> None:
    with pytest.raises(FrameError):
        read(b"[" * 60_000)


@RELAXED
@given(st.text(max_size=2000))
def test_hello_round_trips(token: str) -> None:
    data = frames.hello(token)
    assert frames.decode_header(data[: HEADER.size], frames.FROM_STRANGER).kind is Kind.HELLO
    assert frames.read_hello(data[HEADER.size :]).token == token
    assert token not in repr(frames.read_hello(data[HEADER.size :])) or len(token) < 20


@RELAXED
@given(st.integers(1, frames.MAX_REQUESTED_CHUNKS).map(lambda count: [CHUNK] * count))
def test_requests_round_trip(wanted: list[str]) -> None:
    data = frames.chunks_request(DIGEST, wanted)
    assert (
        frames.decode_header(data[: HEADER.size], frames.FROM_PULLER).nbytes
        == len(data) - HEADER.size
    )
    assert frames.read_chunks_request(data[HEADER.size :]) == (DIGEST, wanted)


@pytest.mark.parametrize("kind", sorted(set(Kind) - frames.FROM_STRANGER))
def test_a_stranger_may_only_ask_for_proof_and_say_hello(kind: Kind) -> None:
    with pytest.raises(FrameError, match="no place here"):
        frames.decode_header(Header(kind, 0).encode(), frames.FROM_STRANGER)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GET / HTTP/1.1\r\n".ljust(HEADER.size), "no Hotweights peer"),
        (HEADER.pack(MAGIC, 99, 0, bytes(32)), "unknown frame kind 99"),
        (b"HW", "has 40 bytes, not 2"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        frames.decode_header(data, frozenset(Kind))


@pytest.mark.parametrize(
    "wanted",
    [
        [],
        [CHUNK] * (frames.MAX_REQUESTED_CHUNKS + 1),
        ["A" * 64],
        ["a" * 63],
        [CHUNK + "\n"],
        [7],
        "a" * 64,
    ],
)
def test_requests_for_what_is_no_chunk(wanted: object) -> None:
    with pytest.raises(FrameError):
        frames.read_chunks_request(json.dumps({"digest": DIGEST, "blake3": wanted}).encode())


@pytest.mark.parametrize("name", ["", "x" * (frames.MAX_QUESTION_CHARS + 1), 7, None, ["ours"]])
def test_questions_that_are_none(name: object) -> None:
    with pytest.raises(FrameError, match="a question is a string"):
        frames.read_question(json.dumps({"name": name}).encode())


@RELAXED
@given(
    st.binary(min_size=frames.NONCE_NBYTES, max_size=frames.NONCE_NBYTES),
    st.text(min_size=1, max_size=frames.MAX_ENDPOINT_CHARS),
    st.binary(min_size=1, max_size=frames.MAX_SIGNATURE_NBYTES),
)
def test_challenge_and_proof_round_trip(nonce: bytes, endpoint: str, signature: bytes) -> None:
    try:
        data = frames.challenge(nonce, endpoint)
    except FrameError:  # of characters for which JSON takes six bytes or more
        assert len(json.dumps(endpoint)) > frames.MAX_ENDPOINT_CHARS
    else:
        header = frames.decode_header(data[: HEADER.size], frames.FROM_STRANGER)
        assert header.kind is Kind.CHALLENGE
        challenge = frames.read_challenge(data[HEADER.size :])
        assert (challenge.nonce, challenge.endpoint) == (nonce, endpoint)
    data = frames.proof(signature)
    assert frames.decode_header(data[: HEADER.size], frames.TO_CHALLENGER).kind is Kind.PROOF
    assert frames.read_proof(data[HEADER.size :]) == signature


@pytest.mark.parametrize(
    "payload",
    [
        {"nonce": "ab" * 31, "endpoint": "tcp://a:1"},
        {"nonce": "AB" * 32, "endpoint": "tcp://a:1"},
        {"nonce": "ab" * 32 + "\n", "endpoint": "tcp://a:1"},
        {"nonce": "ab" * 32},
        {"nonce": "ab" * 32, "endpoint": ""},
        {"nonce": "ab" * 32, "endpoint": "x" * (frames.MAX_ENDPOINT_CHARS + 1)},
        {"nonce": 7, "endpoint": ["tcp://a:1"]},
    ],
)
def test_challenges_that_are_none(payload: object) -> None:
    with pytest.raises(FrameError, match="challenge: "):
        frames.read_challenge(json.dumps(payload).encode())


@pytest.mark.parametrize("signature", ["", "abc", "AB", "ab\n", "ab" * 129, 7, None])
def test_proofs_that_are_none(signature: object) -> None:
    with pytest.raises(FrameError, match="proof: signature must be 1 to 128 bytes"):
        frames.read_proof(json.dumps({"signature": signature}).encode())


def test_a_question_round_trips() -> None:
    data = frames.question("ours")
    assert frames.decode_header(data[: HEADER.size], frames.FROM_PULLER).kind is Kind.QUESTION
    assert frames.read_question(data[HEADER.size :]) == "ours"
