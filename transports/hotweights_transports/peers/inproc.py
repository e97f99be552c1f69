"""The transport without a wire: for tests and simulations of many nodes in one process.

It keeps every promise of the others (authentication first, order, signs of life, missing,
verification, limits), so that what is tested over it holds over them; it is no faster road between
real nodes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from urllib.parse import urlsplit

from hotweights_storage.errors import ChecksumMismatch
from hotweights_transports.peers.base import (
    MAX_MANIFEST_NBYTES,
    Authenticate,
    AuthenticationUnavailable,
    ChunkProvider,
    ClientLimits,
    Deliver,
    Identity,
    Lease,
    Missing,
    PeerClient,
    PeerCorrupt,
    PeerMissing,
    PeerProtocolError,
    PeerRefused,
    PeerServer,
    PeerUnproven,
    PeerUnreachable,
    Prove,
    ServerLimits,
    Want,
    checked_manifest,
)
from hotweights_transports.peers.frames import NONCE_NBYTES
from hotweights_transports.peers.proof import check
from hotweights_transports.peers.rate_limiter import RateLimiter
from hotweights_transports.peers.registry import Availability, Transport
from hotweights_transports.peers.stall_timeout import StallTimeout

# by address: what a port is to the other transports
_servers: dict[str, InprocServer] = {}
_servers_lock = threading.Lock()


class InprocServer(PeerServer):
    """Has no thread: a client calls it in its own."""

    def __init__(
        self,
        uri: str,
        provider: ChunkProvider,
        authenticate: Authenticate,
        limits: ServerLimits,
        prove: Prove | None,
    ) -> None:
        if urlsplit(uri).scheme != "inproc" or not urlsplit(uri).netloc:
            raise ValueError(
                f"{uri}: not an address of a peer in this process; write inproc://name"
            )
        self.address = uri
        self.provider = provider
        self.limits = limits
        self.throttle = (
            RateLimiter(limits.bandwidth_bytes_per_second)
            if limits.bandwidth_bytes_per_second
            else None
        )
        self.closing = threading.Event()
        self._authenticate = authenticate
        self._prove = prove
        self._places = threading.Semaphore(limits.max_connections)
        with _servers_lock:
            if uri in _servers:
                raise OSError(f"{uri}: address already in use")
            _servers[uri] = self

    def close(self) -> None:
        self.closing.set()
        with _servers_lock:
            if _servers.get(self.address) is self:
                del _servers[self.address]

    def proof(self, nonce: bytes, endpoint: str) -> bytes:
        signature = self._prove(nonce, endpoint) if self._prove is not None else None
        if signature is None:
            raise PeerUnproven(self.address, f"it has no key for {endpoint}")
        return signature

    @contextlib.contextmanager
    def admitted(self, token: str) -> Iterator[Identity]:
        try:
            identity = self._authenticate(token)
        except AuthenticationUnavailable as error:
            raise PeerRefused(self.address, f"AuthenticationUnavailable: {error}") from error
        if identity is None:
            raise PeerRefused(
                self.address, "TokenInvalid: the token proves no agent of this installation"
            )
        if not self._places.acquire(blocking=False):
            raise PeerRefused(
                self.address, f"Busy: {self.limits.max_connections} connections already"
            )
        try:
            yield identity
        finally:
            self._places.release()


class InprocClient(PeerClient):
    def __init__(self, uri: str, token: Callable[[], str], limits: ClientLimits, key: str) -> None:
        self.address = uri
        self._token = token
        self._limits = limits
        self._key = key

    def fetch_manifest(self, digest: str, most_nbytes: int = MAX_MANIFEST_NBYTES) -> bytes:
        server = self._server()
        with server.admitted(self._token()):
            data = server.provider.manifest(digest)
        if data is None:
            raise PeerMissing(self.address, f"it does not know the version {digest}")
        if len(data) > most_nbytes:
            raise PeerProtocolError(
                self.address,
                f"a manifest of {len(data)} bytes; at most {most_nbytes} are expected",
            )
        return checked_manifest(self.address, digest, data)

    def ask(self, name: str) -> bytes:
        server = self._server()
        with server.admitted(self._token()) as identity:
            data = server.provider.answer(name, identity)
        if data is None:
            raise PeerMissing(self.address, f"it has no answer to {name}")
        return data

    def fetch_chunks(
        self,
        digest: str,
        wanted: Iterable[Want],
        deliver: Deliver,
        *,
        cancel: threading.Event | None = None,
    ) -> list[Missing]:
        server = self._server()
        missing: list[Missing] = []
        patience = StallTimeout(self.address, self._limits, time.monotonic())
        with server.admitted(self._token()):
            for want in wanted:
                lease = self._lease(server, want, patience, cancel)
                # first of all: a lease of None may also mean that it was cancelled
                if cancel is not None and cancel.is_set():
                    break
                if lease is None:
                    missing.append(
                        Missing(want, version_known=server.provider.manifest(digest) is not None)
                    )
                    continue
                with memoryview(self._read(server, lease, want)) as data:
                    try:
                        deliver(want, data)
                    except ChecksumMismatch as error:
                        raise PeerCorrupt(self.address, str(error)) from error
                patience.answered(time.monotonic())
        return missing

    def close(self) -> None:
        return

    def _server(self) -> InprocServer:
        with _servers_lock:
            server = _servers.get(self.address)
        if server is None:
            raise PeerUnreachable(self.address, "nobody listens there")
        if self._key:
            nonce = secrets.token_bytes(NONCE_NBYTES)
            check(self.address, self._key, nonce, server.proof(nonce, self.address))
        return server

    def _lease(
        self,
        server: InprocServer,
        want: Want,
        patience: StallTimeout,
        cancel: threading.Event | None,
    ) -> Lease | None:
        while cancel is None or not cancel.is_set():
            if server.closing.is_set():
                raise PeerUnreachable(self.address, "it closed")
            found = server.provider.locate(want.blake3)
            if found is None or isinstance(found, Lease):
                return found
            # shorter than a sign of life: `cancel` and `closing` are looked at between two waits
            found.wait(min(0.05, server.limits.waiting_seconds))
            patience.waiting(time.monotonic())
            patience.check(time.monotonic())
        return None

    def _read(self, server: InprocServer, lease: Lease, want: Want) -> bytes:
        try:
            if lease.nbytes != want.nbytes:
                raise PeerProtocolError(
                    self.address, f"{lease.nbytes} bytes for {want.blake3}, which has {want.nbytes}"
                )
            if server.throttle is not None:
                server.throttle.take(lease.nbytes, server.closing)
            return os.pread(lease.fd, lease.nbytes, lease.offset)
        finally:
            lease.release()


class InprocTransport(Transport):
    scheme = "inproc"
    between_hosts = False

    def available(self) -> Availability:
        return Availability(True, "for tests, within one process")

    def listen(
        self,
        uri: str,
        provider: ChunkProvider,
        authenticate: Authenticate,
        limits: ServerLimits | None = None,
        prove: Prove | None = None,
    ) -> PeerServer:
        return InprocServer(uri, provider, authenticate, limits or ServerLimits(), prove)

    def connect(
        self,
        uri: str,
        token: Callable[[], str],
        limits: ClientLimits | None = None,
        key: str = "",
    ) -> PeerClient:
        return InprocClient(uri, token, limits or ClientLimits(), key)


TRANSPORT = InprocTransport()
