"""The side that gives chunks: one thread per puller, because `sendfile` and `recv` release the
interpreter's lock.

Strangers cost a thread for at most `handshake_seconds` and are few (`strangers` says which); who
proved who it is may stay. A connection ends at the first thing that is not as it should be, and takes nothing else with it.
What a chunk is, and whether it is verified, only the provider knows; this module sends what it is
given a lease on.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import socket
import threading
import time
from collections import Counter
from typing import ClassVar

from hotweights_common.few_lines import FewLines
from hotweights_common.reasons import Reason
from hotweights_common.strangers import Strangers
from hotweights_transports.peers import frames
from hotweights_transports.peers.base import (
    Authenticate,
    AuthenticationUnavailable,
    ChunkProvider,
    Identity,
    Lease,
    PeerServer,
    Pending,
    Prove,
    ServerLimits,
)
from hotweights_transports.peers.rate_limiter import RateLimiter
from hotweights_transports.peers.stream import address as addresses
from hotweights_transports.peers.stream.timed_socket import (
    ConnectionBroken,
    DeadlinePassed,
    Tick,
    Unusable,
    Wire,
    within,
)

logger = logging.getLogger(__name__)
logger.addFilter(FewLines())

# for the acceptor, then for all connections together; what hangs longer is left to end by itself
CLOSE_SECONDS = 5.0
MAX_ACCEPTED = 1024  # tokens that are remembered by their hash; each is reviewed all the same


class _Refused(Exception):
    """This connection ends, and the puller is told why."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class _Closing(Exception):
    """This connection ends because the whole server is being closed."""


class StreamServer(PeerServer):
    """One thread accepts, and each connection has one of its own. The provider and the
    authenticator are called in the latter.
    """

    scheme: ClassVar[str] = "tcp"
    wire_type: ClassVar[type[Wire]] = Wire

    def __init__(
        self,
        uri: str,
        provider: ChunkProvider,
        authenticate: Authenticate,
        limits: ServerLimits,
        prove: Prove | None = None,
    ) -> None:
        host, port = addresses.parse(uri, self.scheme)
        self._provider = provider
        self._authenticate = authenticate
        self._prove = prove
        self._limits = limits
        self._throttle = (
            RateLimiter(limits.bandwidth_bytes_per_second)
            if limits.bandwidth_bytes_per_second
            else None
        )
        self._closing = threading.Event()
        self._lock = threading.Lock()  # of the three below
        self._threads: dict[Wire, threading.Thread] = {}
        self._strangers = Strangers[Wire](limits.max_handshakes, limits.max_handshakes_of_address)
        self._accepted: dict[bytes, None] = {}  # sha256 of tokens, the longest unused first
        self._pullers: Counter[str] = Counter()  # connections by node; "" where it is not known
        self._listener = addresses.listen(host, port)
        # pullers speak first, so the kernel keeps whoever says nothing: it costs no thread (tcp(7))
        wait_seconds = math.ceil(limits.handshake_seconds)
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, wait_seconds)
        self.address = addresses.form(host, self._listener.getsockname()[1], self.scheme)
        self._acceptor = threading.Thread(
            target=self._accept, name=f"peers {self.address}", daemon=True
        )
        self._acceptor.start()

    def trouble(self) -> str:
        if self._acceptor.is_alive() or self._closing.is_set():
            return ""
        return f"{self.address} accepts no peers any more"

    def close(self) -> None:
        # in this order: once the acceptor has ended, no thread is added to those hung up below
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(); closing alone would not
        self._listener.close()
        self._acceptor.join(CLOSE_SECONDS)
        with self._lock:
            threads = dict(self._threads)
        for wire in threads:
            wire.hang_up()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, (host, *_) = self._listener.accept()
            except OSError as error:
                # e.g. out of file descriptors: come back a little later
                if self._closing.wait(0.1):
                    return
                logger.warning("%s: accept failed: %s", self.address, error)
                continue
            try:
                self._admit(sock, host)
            # out of threads, or gone already: it costs this connection, and nobody else
            except (RuntimeError, MemoryError, OSError) as error:
                sock.close()
                logger.warning("%s: a connection of %s is dropped: %s", self.address, host, error)

    def _admit(self, sock: socket.socket, host: str) -> None:
        with self._lock:
            if self._closing.is_set():
                sock.close()
                return
            wire = self.wire_type(sock)
            stays, leaves = self._strangers.admit(wire, host, time.monotonic())
            # without a word: what a stranger gets for nothing, many strangers get
            if leaves is not None:
                leaves.hang_up()
            if not stays:
                sock.close()
                return
            thread = threading.Thread(
                target=self._converse, args=(wire,), name="peer connection", daemon=True
            )
            self._threads[wire] = thread
        try:
            thread.start()
        except (RuntimeError, MemoryError):
            self._forget(wire)
            raise

    def _forget(self, wire: Wire) -> None:
        with self._lock:
            del self._threads[wire]
            self._strangers.leave(wire)

    def _converse(self, wire: Wire) -> None:
        promoted: Identity | None = None
        try:
            # the token first: only who proved who it is may take one of the pullers' places
            identity, protocol = self._handshake(wire)
            self._promote(wire, identity)
            promoted = identity
            wire.send(frames.welcome(protocol), within(self._limits.handshake_seconds))
            self._prepare(wire)
            self._answer(wire, identity)
        except _Refused as refusal:
            wire.say_last(frames.refused(refusal.reason, str(refusal)))
        except frames.FrameError as error:
            wire.say_last(frames.refused(Reason.PROTOCOL_ERROR, str(error)))
        except Unusable as error:
            wire.say_last(frames.refused(Reason.TRANSPORT_UNUSABLE, str(error)))
        except (ConnectionBroken, DeadlinePassed, _Closing) as error:
            logger.debug("%s: a puller's connection ended: %s", self.address, error)
        finally:
            wire.close()
            self._forget(wire)
            if promoted is not None:
                with self._lock:
                    self._pullers -= Counter([promoted.node])  # one with none left goes

    def _handshake(self, wire: Wire) -> tuple[Identity, int]:
        """Who it is, and the protocol to speak."""
        in_time = within(self._limits.handshake_seconds)
        header = frames.decode_header(
            wire.receive(frames.HEADER.size, in_time), frames.FROM_STRANGER
        )
        if header.kind is frames.Kind.CHALLENGE:
            payload = bytes(wire.receive(header.nbytes, in_time))
            wire.send(frames.proof(self._signed(frames.read_challenge(payload))), in_time)
            header = frames.decode_header(
                wire.receive(frames.HEADER.size, in_time), frames.FROM_CHALLENGER
            )
        hello = frames.read_hello(bytes(wire.receive(header.nbytes, in_time)))
        common = set(hello.protocols) & set(frames.PROTOCOLS)
        if not common:
            raise _Refused(
                Reason.PROTOCOL_UNSUPPORTED,
                f"this peer speaks {list(frames.PROTOCOLS)}: upgrade the older agent",
            )
        key = hashlib.sha256(hello.token.encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            # an agent that was let in is so again, whoever else comes from its address
            if key not in self._accepted and not self._strangers.may_be_reviewed(
                wire, time.monotonic()
            ):
                raise _Refused(
                    Reason.BUSY, "too many tokens of this address were refused: try again"
                )
            self._strangers.said_hello(wire)
        try:
            identity = self._authenticate(hello.token)
        except AuthenticationUnavailable as error:
            raise _Refused(
                Reason.AUTHENTICATION_UNAVAILABLE,
                f"the token could not be reviewed ({error}): try again",
            ) from error
        if identity is None:
            with self._lock:
                self._strangers.refused(wire, time.monotonic())
            raise _Refused(
                Reason.TOKEN_INVALID,
                "the token proves no agent of this installation; no weights without one",
            )
        with self._lock:
            self._strangers.accepted(wire)
            self._accepted.pop(key, None)
            self._accepted[key] = None
            if len(self._accepted) > MAX_ACCEPTED:
                del self._accepted[next(iter(self._accepted))]
        return identity, max(common)

    def _signed(self, challenge: frames.Challenge) -> bytes:
        if self._prove is None:
            raise _Refused(Reason.PEER_UNPROVEN, "this peer has no key")
        signature = self._prove(challenge.nonce, challenge.endpoint)
        if signature is None:
            raise _Refused(Reason.PEER_UNPROVEN, f"this peer is not at {challenge.endpoint}")
        return signature

    def _promote(self, wire: Wire, identity: Identity) -> None:
        """From stranger to puller, if there is room."""
        node = identity.node
        with self._lock:
            total = self._pullers.total()
            if total >= self._limits.max_connections:
                raise _Refused(Reason.BUSY, f"{total} connections already: try another peer")
            if node and self._pullers[node] >= self._limits.max_connections_of_node:
                raise _Refused(Reason.BUSY, f"{self._pullers[node]} connections of {node} already")
            self._strangers.leave(wire)
            self._pullers[node] += 1

    def _prepare(self, wire: Wire) -> None:
        piece_nbytes = self._throttle.piece_nbytes if self._throttle else None
        wire.prepare_to_serve(
            piece_nbytes, self._unless_closing(within(self._limits.handshake_seconds))
        )

    def _answer(self, wire: Wire, identity: Identity) -> None:
        while True:
            header = self._next_request(wire)
            payload = bytes(wire.receive(header.nbytes, within(self._limits.request_seconds)))
            if header.kind is frames.Kind.MANIFEST:
                manifest = self._provider.manifest(frames.read_manifest_request(payload))
                self._send_document(wire, frames.Kind.MANIFEST_BYTES, manifest)
                continue
            if header.kind is frames.Kind.QUESTION:
                answer = self._provider.answer(frames.read_question(payload), identity)
                self._send_document(wire, frames.Kind.ANSWER, answer)
                continue
            digest, wanted = frames.read_chunks_request(payload)
            logger.debug(
                "%s: %d chunks of %s for %s", self.address, len(wanted), digest, identity.name
            )
            for blake3 in wanted:
                self._send_chunk(wire, digest, blake3)

    def _next_request(self, wire: Wire) -> frames.Header:
        # idle until the first byte has come; from then on it is a request, which has to end
        data = wire.receive(1, self._unless_closing(within(self._limits.idle_seconds)))
        data += wire.receive(frames.HEADER.size - 1, within(self._limits.request_seconds))
        return frames.decode_header(data, frames.FROM_PULLER)

    def _unless_closing(self, tick: Tick) -> Tick:
        def checked(nbytes: int) -> None:
            if self._closing.is_set():
                raise _Closing("the server is closing")
            tick(nbytes)

        return checked

    def _send_document(self, wire: Wire, kind: frames.Kind, document: bytes | None) -> None:
        if document is None:
            self._send_header(wire, frames.Header(frames.Kind.UNKNOWN, 0))
            return
        self._send_header(wire, frames.Header(kind, len(document)), more=True)
        wire.send(document, self._unless_closing(within(self._limits.send_seconds)))

    def _send_chunk(self, wire: Wire, digest: str, blake3: str) -> None:
        raw = bytes.fromhex(blake3)
        while True:
            found = self._provider.locate(blake3)
            if isinstance(found, Lease):
                try:
                    self._send_lease(wire, raw, found)
                finally:
                    found.release()
                return
            if found is None:
                # a version that is not known may be so only yet: the puller comes again
                known = self._provider.manifest(digest) is not None
                self._send_header(
                    wire,
                    frames.Header(frames.Kind.MISSING if known else frames.Kind.UNKNOWN, 0, raw),
                )
                return
            self._wait(wire, raw, found)

    def _wait(self, wire: Wire, raw: bytes, pending: Pending) -> None:
        if not pending.wait(self._limits.waiting_seconds):
            self._send_header(wire, frames.Header(frames.Kind.WAITING, 0, raw))
        if self._closing.is_set():
            raise _Closing("the server is closing")

    def _send_header(self, wire: Wire, header: frames.Header, *, more: bool = False) -> None:
        wire.send(
            header.encode(), self._unless_closing(within(self._limits.send_seconds)), more=more
        )

    def _send_lease(self, wire: Wire, raw: bytes, lease: Lease) -> None:
        self._send_header(
            wire, frames.Header(frames.Kind.CHUNK, lease.nbytes, raw), more=lease.nbytes > 0
        )
        send = wire.send_file if lease.sealed else wire.send_copy
        # whole without a limit: one system call for all of it; range() takes no step of 0
        piece_nbytes = self._throttle.piece_nbytes if self._throttle else max(1, lease.nbytes)
        for begin in range(0, lease.nbytes, piece_nbytes):
            piece = min(piece_nbytes, lease.nbytes - begin)
            if self._throttle is not None:
                self._throttle.take(piece, self._closing)
            send(
                lease.fd,
                lease.offset + begin,
                piece,
                self._unless_closing(within(self._limits.send_seconds)),
            )
