"""What moves chunks between nodes, whatever the wire: the words, the errors, and the protocol that
every transport keeps.

This module opens no socket and starts no thread; it says which threads call what, because callers
must know. It knows chunks by their BLAKE3 digest and
versions by their manifest's digest, and refuses to know what a tensor is. A transport that keeps
the promises of `PeerServer` and `PeerClient` passes ``tests/transports/peers``, which runs over
every scheme of the registry.

Errors::

    PeerError                 this peer is of no use for what was asked: go on with the next source
    ├── PeerUnreachable       no connection, or it broke
    ├── PeerTimeout           connected, but silent, stalled, or slower than the floor
    ├── PeerRefused           it does not talk to us: token, protocol, too busy
    ├── PeerUnproven          it is not shown to be whom the route means: it got no token
    ├── PeerMissing           it neither has nor fetches what was asked for
    ├── PeerProtocolError     it sent what nobody asked for, or what cannot be understood
    └── PeerCorrupt           its bytes are not what their digest promises: ChecksumMismatch
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Protocol, Self

from hotweights_common.errors import HotweightsError
from hotweights_common.reasons import Reason

# none that the API server takes: whoever collects such tokens cannot act as an agent there
TOKEN_AUDIENCE = "hotweights-peer"
MAX_MANIFEST_NBYTES = 512 * 1024 * 1024  # what the planner's own constant of that name says


class PeerError(HotweightsError):
    """A peer is of no use for what was asked of it. `reason` is CamelCase, as conditions and
    metrics want it.
    """

    reason = Reason.PEER_ERROR

    def __init__(self, address: str, message: str) -> None:
        super().__init__(f"{address}: {message}")
        self.address = address


class PeerUnreachable(PeerError):
    reason = Reason.PEER_UNREACHABLE


class PeerTimeout(PeerError):
    reason = Reason.PEER_TIMEOUT


class PeerRefused(PeerError):
    reason = Reason.PEER_REFUSED


class PeerUnproven(PeerError):
    reason = Reason.PEER_UNPROVEN

    def __init__(self, address: str, why: str) -> None:
        super().__init__(
            address, f"it did not prove that it is the agent of this route, and got no token: {why}"
        )


class PeerMissing(PeerError):
    reason = Reason.PEER_MISSING


class PeerProtocolError(PeerError):
    reason = Reason.PEER_PROTOCOL_ERROR


class PeerCorrupt(PeerError):
    reason = Reason.CHECKSUM_MISMATCH


def checked_manifest(address: str, digest: str, data: bytes) -> bytes:
    """The manifest that a peer sent, if it is the one that was asked for. Raises `PeerCorrupt`."""
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
        raise PeerCorrupt(address, f"its manifest of {len(data)} bytes is not {digest}")
    return data


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """Who a puller proved to be."""

    name: str
    """Of the service account: ``system:serviceaccount:<namespace>:<name>``."""
    node: str = ""
    """Of the node that the token is bound to; empty where the authenticator does not tell."""


Authenticate = Callable[[str], Identity | None]
"""Token → who that is, or None. Called in the connection's thread, may block on the API server, and
caches by itself.
"""


Prove = Callable[[bytes, str], bytes | None]
"""Nonce and the endpoint that a puller dialled → a signature over both (`proof.ServerKey.prove`), or
None: that endpoint is not this process's. Called in the connection's thread, for strangers.
"""


class AuthenticationUnavailable(Exception):
    """Raised by an `Authenticate` that could not find out; the puller is refused, and told to come
    again.
    """


@dataclasses.dataclass(frozen=True, slots=True)
class Lease:
    """Verified bytes of one chunk (``nbytes`` at ``offset`` of ``fd``), which stay where they are
    until `release` is called: exactly once, by the taker, from any thread.
    """

    fd: int
    offset: int
    nbytes: int
    release: Callable[[], None]
    sealed: bool = False
    """Nothing can change them any more. Only then may a transport send the pages themselves
    (`sendfile`): pages that wait in a socket for a slow puller are pinned, and the kernel refuses
    to seal a memfd with pinned pages (EBUSY).
    """


@dataclasses.dataclass(frozen=True, slots=True)
class Pending:
    """A chunk that this node is fetching itself."""

    wait: Callable[[float], bool]
    """Up to so many seconds; True as soon as asking again makes sense: it was verified, or it never
    will be.
    """


class ChunkProvider(Protocol):
    """What a node has to give. A server calls it, from the threads of its connections, many at
    once; it answers without I/O.
    """

    def locate(self, blake3: str) -> Lease | Pending | None:
        """The verified bytes; or a way to wait for them; or None: not here, and not on its way."""
        ...

    def manifest(self, digest: str) -> bytes | None:
        """The manifest of a version that is staged or being staged here; None for any other."""
        ...

    def answer(self, name: str, asking: Identity) -> bytes | None:
        """What this node has to say under that name, to whoever asks; None: nothing (yet). It is
        for what is built above this protocol, which itself has no use for it.
        """
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class Want:
    """One chunk to fetch: its BLAKE3 (64 hexadecimal digits) and how many bytes it has."""

    blake3: str
    nbytes: int


Deliver = Callable[[Want, memoryview], None]
"""Takes the bytes of one chunk as they came: it verifies them, raises `errors.ChecksumMismatch` if
they are wrong, and else stores them (`ImageBuilder.put`). The view is valid during the call only.
Called from the streams' threads, several at once.
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Missing:
    """A chunk that the peer neither has nor fetches."""

    want: Want
    version_known: bool
    """False: the peer does not know the version at all, perhaps only *not yet*, and asking again
    later may help.
    """


@dataclasses.dataclass(frozen=True, slots=True)
class ServerLimits:
    """What a server lets pullers cost it."""

    max_connections: int = 64
    """Authenticated connections at once; further ones are refused with a reason. A puller opens one
    per stream.
    """
    max_connections_of_node: int = 16
    """Of them, those of one node that its token names: no peer takes the places of all others."""
    max_handshakes: int = 64
    """Connections that have not proved who they are. When there is one more, one is dropped without
    an answer: of the address that has the most of them, the one that has been silent for longest.
    """
    max_handshakes_of_address: int = 16
    """Of them, those of one address. A puller opens a few streams to a peer at the same time."""
    handshake_seconds: float = 5.0
    """For the whole hello and the challenge before it, however slowly their bytes drip. The review
    of the token is not counted.
    """
    request_seconds: float = 10.0
    """For the rest of a request whose first byte has come."""
    idle_seconds: float = 300.0
    """Between two requests."""
    send_seconds: float = 30.0
    """For a puller to take one chunk, on top of what the bandwidth limit makes it last."""
    waiting_seconds: float = 1.0
    """Between two signs of life while a chunk is still on its way to this node."""
    bandwidth_bytes_per_second: int | None = None
    """Of all connections together; None for no limit."""


@dataclasses.dataclass(frozen=True, slots=True)
class ClientLimits:
    """How many streams a puller opens to a peer, and how long it bears with it."""

    streams: int = 2
    """Connections per peer. One is bound by the core that copies and hashes what it receives; a
    second one receives meanwhile.
    """
    window_nbytes: int = 32 * 1024 * 1024
    """Asked for and not yet received, per stream: large enough that the peer never idles, and small
    enough to be asked of another one when this one dies.
    """
    window_chunks: int = 256
    """The same as a count, for versions with many tiny tensors."""
    connect_seconds: float = 5.0
    """To connect, and to be given the proof and be welcomed, each."""
    silence_seconds: float = 10.0
    """Without a byte, signs of life included: the peer is dead."""
    stall_seconds: float = 30.0
    """Without a verified chunk although the peer lives. Longer than the silence, so that in a chain
    whose head died only its child goes elsewhere, and the others wait for that child.
    """
    floor_bytes_per_second: int = 1024 * 1024
    """Slower than this, over `floor_window_seconds` in which the peer had something to send, is as
    good as dead; 0: none.
    """
    floor_window_seconds: float = 10.0


class PeerServer(ABC):
    """Gives chunks to pullers that proved who they are. It runs in the process of the node that has
    them, in threads of its own; whoever made it only closes it, from any thread but those.

    Order of events on each connection:

    1. PULLER, where it knows the server's key, sends a challenge. SERVER answers with its `Prove`,
       or refuses. Without the proof the puller leaves; its token was not sent.
    2. PULLER sends its token. SERVER calls `Authenticate` before anything else; where it says None,
       the puller gets a refusal that names the cause, and not one byte of a manifest or a chunk.
    3. PULLER asks for a manifest by digest, for chunks by BLAKE3, or something by name, as often as
       it likes, several requests ahead.
    4. SERVER answers in the order asked. A chunk leaves as soon as the provider has it verified;
       until then the puller gets a sign of life every `ServerLimits.waiting_seconds`. What the
       provider does not know is answered as missing.
    5. Whatever goes wrong (garbage, a puller that is slow or gone, a deadline) ends this connection
       only.

    A server serves from construction until `close`, which ends all connections and waits for their
    threads. A closed server serves no more; make another one.
    """

    address: str
    """The URI under which pullers reach it, with the port that was chosen for port 0."""

    def trouble(self) -> str:
        """Why it serves nobody any more although it was not closed; empty: it serves."""
        return ""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PeerClient(ABC):
    """Pulls from one peer, in the process of the node that lacks something. One thread uses a
    client at a time; connections are opened at first use and kept.

    Every method but `close` may raise any `PeerError`. After one, and after whatever else `deliver`
    raised, the client may be used again: it connects anew. `close` ends the connections that no
    call uses: so it comes after the last one has returned (`cancel` makes a fetch return). It may
    be called twice.
    """

    address: str
    """The peer's URI, as it stands in every error."""

    @abstractmethod
    def fetch_manifest(self, digest: str, most_nbytes: int = MAX_MANIFEST_NBYTES) -> bytes:
        """The manifest, its sha256 verified against ``sha256:<hex>``; `PeerMissing` where the peer
        does not know it, `PeerProtocolError` where it announces more than ``most_nbytes``: of such
        a one not a byte is received.
        """

    @abstractmethod
    def ask(self, name: str) -> bytes:
        """What the peer's `ChunkProvider.answer` says under that name, at most 32 KiB; raises
        `PeerMissing` where that is nothing (yet).
        """

    @abstractmethod
    def fetch_chunks(
        self,
        digest: str,
        wanted: Iterable[Want],
        deliver: Deliver,
        *,
        cancel: threading.Event | None = None,
    ) -> list[Missing]:
        """Fetch `wanted` in that order, hand each chunk to `deliver`, and return what the peer does
        not have. Called in the puller's thread, which waits; any thread may set `cancel`.

        `wanted` is consumed lazily, under a lock, as the window opens: it may be fed by someone
        else meanwhile. A chunk that `deliver` finds wrong ends the fetch as `PeerCorrupt`; what
        else it raises passes through.

        On any error, and when `cancel` is set (which returns early), every chunk that was taken
        from `wanted` and not delivered is still to be fetched. When this returns or raises,
        `deliver` is not called any more.
        """

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
