"""The side that pulls: several streams to one peer, one thread each, fed from one list of wanted
chunks.

Each stream asks ahead by a window, so that the peer never waits for a question, and receives chunk
after chunk into one buffer that stays in the processor's cache, where the image hashes it and takes
it from; while one stream does that, another receives. A chunk that is not what its digest promises
ends the fetch: such a peer is not asked again.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

from hotweights_storage.errors import ChecksumMismatch
from hotweights_transports.peers import frames
from hotweights_transports.peers.base import (
    MAX_MANIFEST_NBYTES,
    ClientLimits,
    Deliver,
    Missing,
    PeerClient,
    PeerCorrupt,
    PeerMissing,
    PeerProtocolError,
    PeerRefused,
    PeerTimeout,
    PeerUnproven,
    PeerUnreachable,
    Want,
    checked_manifest,
)
from hotweights_transports.peers.proof import check
from hotweights_transports.peers.stall_timeout import StallTimeout
from hotweights_transports.peers.stream import address as addresses
from hotweights_transports.peers.stream.timed_socket import (
    ConnectionBroken,
    DeadlinePassed,
    Tick,
    Unusable,
    Wire,
    within,
)


class _Stopped(Exception):
    """Another stream failed, or the caller cancelled."""


class _WantedChunks:
    """The wanted chunks, handed to the streams in order, and what came of them."""

    def __init__(
        self, wanted: Iterable[Want], deliver: Deliver, cancel: threading.Event | None
    ) -> None:
        self._wanted: Iterator[Want] = iter(wanted)
        self._lock = threading.Lock()
        self._cancel = cancel
        self._stop = threading.Event()
        self.deliver = deliver
        self.missing: list[Missing] = []

    def take(self, nbytes: int, count: int) -> list[Want]:
        """Up to `count` chunks of together about `nbytes`; one at least, as long as there are
        any.
        """
        taken: list[Want] = []
        with self._lock:
            while (
                nbytes > 0 and len(taken) < count and (want := next(self._wanted, None)) is not None
            ):
                taken.append(want)
                nbytes -= want.nbytes
        return taken

    def stop(self) -> None:
        self._stop.set()

    def check(self) -> None:
        if self._stop.is_set() or (self._cancel is not None and self._cancel.is_set()):
            raise _Stopped


class StreamClient(PeerClient):
    """Each stream of a fetch has a thread of its own, which ends with the fetch; its connection is
    kept for the next one.
    """

    scheme: ClassVar[str] = "tcp"
    wire_type: ClassVar[type[Wire]] = Wire

    def __init__(
        self, uri: str, token: Callable[[], str], limits: ClientLimits, key: str = ""
    ) -> None:
        self._endpoint = addresses.parse(uri, self.scheme)
        self.address = uri
        self._token = token
        self._limits = limits
        self._key = key
        self._idle: list[_Stream] = []

    def fetch_manifest(self, digest: str, most_nbytes: int = MAX_MANIFEST_NBYTES) -> bytes:
        stream = self._open()
        with self._kept_if_clean(stream):
            data = stream.manifest(digest, most_nbytes)
        return checked_manifest(self.address, digest, data)

    def ask(self, name: str) -> bytes:
        stream = self._open()
        with self._kept_if_clean(stream):
            return stream.answer(name)

    def fetch_chunks(
        self,
        digest: str,
        wanted: Iterable[Want],
        deliver: Deliver,
        *,
        cancel: threading.Event | None = None,
    ) -> list[Missing]:
        feed = _WantedChunks(wanted, deliver, cancel)
        with ThreadPoolExecutor(
            self._limits.streams, thread_name_prefix=f"pull {self.address}"
        ) as executor:
            streams = [
                executor.submit(self._run, digest, feed) for _ in range(self._limits.streams)
            ]
        # only when all have ended: until then `deliver` may be called
        for stream in streams:
            stream.result()
        return feed.missing

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _run(self, digest: str, feed: _WantedChunks) -> None:
        finished = False
        try:
            self._pull(digest, feed)
            finished = True
        except _Stopped:
            return  # the stream that failed says why
        finally:
            if not finished:
                feed.stop()

    def _pull(self, digest: str, feed: _WantedChunks) -> None:
        # before a connection is opened: there may be less to do than there are streams
        first = feed.take(self._limits.window_nbytes, self._limits.window_chunks)
        if not first:
            return
        stream = self._open()
        with self._kept_if_clean(stream):
            stream.chunks(digest, first, feed)

    def _open(self) -> _Stream:
        while True:
            try:
                stream = self._idle.pop()  # atomic, so streams may open at the same time
            except IndexError:
                sock = _connect(self.address, self._endpoint, self._limits.connect_seconds)
                return _Stream(
                    self.address, self.wire_type(sock), self._token, self._limits, self._key
                )
            # the server may have closed it meanwhile, or have answered what nobody waits for
            if stream.wire.is_quiet():
                return stream
            stream.close()

    @contextlib.contextmanager
    def _kept_if_clean(self, stream: _Stream) -> Iterator[None]:
        clean = False
        try:
            yield
            clean = True
        except PeerMissing:  # an answer like any other
            clean = True
            raise
        except ConnectionBroken as error:
            raise PeerUnreachable(self.address, str(error)) from error
        except DeadlinePassed as error:
            raise PeerTimeout(self.address, str(error)) from error
        except frames.FrameError as error:
            raise PeerProtocolError(self.address, str(error)) from error
        finally:
            if clean:
                self._idle.append(stream)
            else:
                stream.close()


class _Stream:
    """One authenticated connection, used by one thread at a time. It is of no use after an error
    other than `PeerMissing`.
    """

    def __init__(
        self, address: str, wire: Wire, token: Callable[[], str], limits: ClientLimits, key: str
    ) -> None:
        self._address = address
        self._limits = limits
        self.wire = wire
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            in_time = within(limits.connect_seconds)
            if key:
                self._demand_proof(key, in_time)
            self._introduce(token(), in_time)
            stack.pop_all()

    def close(self) -> None:
        self.wire.close()

    def _demand_proof(self, key: str, in_time: Tick) -> None:
        """Before anything of ours is told: an older server, or whoever else is there, is refused
        too, for otherwise to say nothing would be proof enough.
        """
        nonce = secrets.token_bytes(frames.NONCE_NBYTES)
        with self._answered("proof"):
            self.wire.send(frames.challenge(nonce, self._address), in_time)
            try:
                header = frames.decode_header(
                    self.wire.receive(frames.HEADER.size, in_time), frames.TO_CHALLENGER
                )
                payload = bytes(self.wire.receive(header.nbytes, in_time))
                if header.kind is frames.Kind.REFUSED:
                    refusal = frames.read_refused(payload)
                    raise PeerUnproven(self._address, f"{refusal.reason}: {refusal.message}")
                signature = frames.read_proof(payload)
            except frames.FrameError as error:
                raise PeerUnproven(self._address, str(error)) from error
        check(self._address, key, nonce, signature)

    def _introduce(self, token: str, in_time: Tick) -> None:
        with self._answered("welcome"):
            self.wire.send(frames.hello(token), in_time)
            header = self._header(frames.TO_STRANGER, in_time)
            frames.read_welcome(bytes(self.wire.receive(header.nbytes, in_time)))
            self.wire.prepare_to_pull(in_time)

    @contextlib.contextmanager
    def _answered(self, what: str) -> Iterator[None]:
        try:
            yield
        except DeadlinePassed as error:
            raise PeerTimeout(
                self._address, f"no {what} within {self._limits.connect_seconds:g} s"
            ) from error
        except ConnectionBroken as error:
            raise PeerUnreachable(
                self._address, f"it hung up instead of a {what}: {error}"
            ) from error
        except Unusable as error:
            raise PeerRefused(self._address, str(error)) from error
        except frames.FrameError as error:
            raise PeerProtocolError(self._address, str(error)) from error

    def _header(self, allowed: frozenset[frames.Kind], tick: Tick) -> frames.Header:
        header = frames.decode_header(self.wire.receive(frames.HEADER.size, tick), allowed)
        if header.kind is frames.Kind.REFUSED:
            refusal = frames.read_refused(bytes(self.wire.receive(header.nbytes, tick)))
            raise PeerRefused(self._address, f"{refusal.reason}: {refusal.message}")
        return header

    def manifest(self, digest: str, most_nbytes: int) -> bytes:
        return self._document(
            frames.manifest_request(digest),
            frames.Kind.MANIFEST_BYTES,
            most_nbytes,
            f"it does not know the version {digest}",
        )

    def answer(self, name: str) -> bytes:
        kind = frames.Kind.ANSWER
        return self._document(
            frames.question(name), kind, frames.MAX_NBYTES[kind], f"it has no answer to {name}"
        )

    def _document(self, request: bytes, kind: frames.Kind, most_nbytes: int, unknown: str) -> bytes:
        patience = StallTimeout(self._address, self._limits, time.monotonic())

        def tick(nbytes: int) -> None:
            now = time.monotonic()
            if nbytes:
                patience.received(nbytes, now)
            patience.check(now)

        self.wire.send(request, within(self._limits.silence_seconds))
        header = self._header(frames.TO_PULLER, tick)
        if header.kind is frames.Kind.UNKNOWN:
            raise PeerMissing(self._address, unknown)
        if header.kind is not kind:
            raise frames.FrameError(
                f"a {header.kind.name} frame came instead of a {kind.name} frame"
            )
        # before a byte of it: until its digest was compared, the peer alone says how large it is
        if header.nbytes > most_nbytes:
            raise frames.FrameError(
                f"a {kind.name} frame of {header.nbytes} bytes; at most {most_nbytes} are expected"
            )
        return bytes(self.wire.receive(header.nbytes, tick))

    def chunks(self, digest: str, first: list[Want], feed: _WantedChunks) -> None:
        _Pull(self._address, self._limits, self.wire, self._header, digest, feed).run(first)


class _Pull:
    """One stream's part of one fetch."""

    def __init__(
        self,
        address: str,
        limits: ClientLimits,
        wire: Wire,
        header: Callable[[frozenset[frames.Kind], Tick], frames.Header],
        digest: str,
        feed: _WantedChunks,
    ) -> None:
        self._address = address
        self._limits = limits
        self._wire = wire
        self._header = header
        self._digest = digest
        self._feed = feed
        self._patience = StallTimeout(address, limits, time.monotonic())
        self._asked: deque[Want] = deque()
        self._asked_nbytes = 0
        self._buffer = bytearray()

    def run(self, first: list[Want]) -> None:
        self._ask(first)
        while self._asked:
            self._feed.check()
            self._receive_answer()
            # when half the window is free: a request for each chunk would be as many packets
            room = self._limits.window_nbytes - self._asked_nbytes
            spare = self._limits.window_chunks - len(self._asked)
            if (
                2 * room >= self._limits.window_nbytes and 2 * spare >= self._limits.window_chunks
            ) or not self._asked:
                self._ask(self._feed.take(room, spare))

    def _ask(self, wants: list[Want]) -> None:
        for begin in range(0, len(wants), frames.MAX_REQUESTED_CHUNKS):
            batch = wants[begin : begin + frames.MAX_REQUESTED_CHUNKS]
            request = frames.chunks_request(self._digest, [want.blake3 for want in batch])
            self._wire.send(request, within(self._limits.silence_seconds))
        self._asked.extend(wants)
        self._asked_nbytes += sum(want.nbytes for want in wants)

    def _tick(self, nbytes: int) -> None:
        now = time.monotonic()
        if nbytes:
            self._patience.received(nbytes, now)
        self._feed.check()
        self._patience.check(now)

    def _receive_answer(self) -> None:
        want = self._asked[0]
        header = self._header(frames.TO_PULLER, self._tick)
        # answers come in the order asked, so anything else is out of step
        if header.blake3 != bytes.fromhex(want.blake3):
            raise frames.FrameError(
                f"a {header.kind.name} frame for another chunk than {want.blake3}"
            )
        now = time.monotonic()
        match header.kind:
            case frames.Kind.WAITING:
                self._patience.waiting(now)
                self._patience.check(now)
                return  # it stays asked for
            case frames.Kind.CHUNK:
                self._receive_chunk(want, header.nbytes)
            case frames.Kind.MISSING | frames.Kind.UNKNOWN:
                self._feed.missing.append(
                    Missing(want, version_known=header.kind is frames.Kind.MISSING)
                )
            case _:
                raise frames.FrameError(f"a {header.kind.name} frame answers no request for chunks")
        self._asked.popleft()
        self._asked_nbytes -= want.nbytes
        now = time.monotonic()
        self._patience.answered(now)
        self._patience.check(now)

    def _receive_chunk(self, want: Want, nbytes: int) -> None:
        if nbytes != want.nbytes:
            raise frames.FrameError(
                f"{nbytes} bytes for chunk {want.blake3}, which has {want.nbytes}"
            )
        if nbytes > len(self._buffer):
            self._buffer = bytearray(nbytes)
        with memoryview(self._buffer)[:nbytes] as data:
            self._wire.receive_chunk(data, self._tick)
            came_at = time.monotonic()
            try:
                self._feed.deliver(want, data)
            except ChecksumMismatch as error:
                raise PeerCorrupt(self._address, str(error)) from error
            self._patience.kept_waiting(time.monotonic() - came_at)


def _connect(address: str, endpoint: tuple[str, int], timeout_seconds: float) -> socket.socket:
    try:
        return socket.create_connection(endpoint, timeout=timeout_seconds)
    except OSError as error:  # includes what the resolver says
        raise PeerUnreachable(address, f"cannot connect: {error}") from error
