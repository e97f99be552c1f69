"""Small JSON messages between the head of a group and its members, each side sure that the other
one has the secret.

A launch line starts a program, so a node must know who sent it. Both sides give a nonce; from the
secret and both nonces comes the key of every further message's MAC, together with its direction and
its number: nothing can be forged, repeated or moved. The secret itself is never sent. What is said
is not secret. Without a secret (a job within one host) the same is done with an empty one, and
`check_reach` keeps it there.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import struct
from typing import Any, Self

from hotweights_common import hosts
from hotweights_transports.peers.base import (
    PeerError,
    PeerProtocolError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
)
from hotweights_transports.peers.stream.timed_socket import (
    ConnectionBroken,
    DeadlinePassed,
    Wire,
    within,
)

MAX_MESSAGE_NBYTES = 256 * 1024  # a beginning names every rank's address: 256 bytes for each
_NONCE_NBYTES = 32  # as long as the digest that is made of it
_HEADER = struct.Struct("!4sI32s")
_MAGIC = b"HWM1"
Message = dict[str, Any]


def check_reach(address: str, host: str, secret: bytes) -> None:
    """Refuse to talk to other hosts without a secret: raises `PeerRefused`."""
    if not secret and not hosts.is_loopback(host):
        text = (
            "without a secret only ranks of this host may form a group; set HOTWEIGHTS_PEER_TOKEN "
            "on all of them"
        )
        raise PeerRefused(address, text)


class Channel:
    """One connection, after the exchange of nonces, on either side (``head`` says which). One
    thread sends at a time, and one receives; `hang_up` is for any. The MAC is HMAC-SHA-256
    (RFC 2104). After an error other than `PeerTimeout` before a message's first byte, it can only
    be closed. All but `hang_up` and `close` raise `PeerError`.
    """

    def __init__(
        self, sock: socket.socket, address: str, secret: bytes, *, head: bool, seconds: float
    ) -> None:
        self.address = address
        self._wire = Wire(sock)
        self._sent = self._received = 0
        self._ours, self._theirs = (b"head", b"member") if head else (b"member", b"head")
        mine = secrets.token_bytes(_NONCE_NBYTES)
        try:
            with _WireErrors(address):
                self._wire.send(_MAGIC + mine, within(seconds))
                theirs = bytes(self._wire.receive(len(_MAGIC) + _NONCE_NBYTES, within(seconds)))
            if not theirs.startswith(_MAGIC):
                raise PeerProtocolError(address, "this is no member of a group of Hotweights")
        except PeerError:
            self.close()
            raise
        both = mine + theirs[len(_MAGIC) :] if head else theirs[len(_MAGIC) :] + mine
        self._key = hmac.digest(secret, b"hotweights-mpi-group" + both, hashlib.sha256)

    def send(self, message: Message, seconds: float) -> None:
        """Send one message, within so many seconds."""
        payload = json.dumps(message, separators=(",", ":")).encode()
        if len(payload) > MAX_MESSAGE_NBYTES:
            raise PeerProtocolError(
                self.address, f"a message of {len(payload)} bytes; at most {MAX_MESSAGE_NBYTES}"
            )
        header = _HEADER.pack(_MAGIC, len(payload), self._mac(self._ours, self._sent, payload))
        self._sent += 1
        with _WireErrors(self.address):
            self._wire.send(header + payload, within(seconds))

    def receive(self, seconds: float) -> Message:
        """The next message, within so many seconds, and only if the other side has our secret."""
        with _WireErrors(self.address):
            in_time = within(seconds)
            magic, nbytes, mac = _HEADER.unpack(self._wire.receive(_HEADER.size, in_time))
            if magic != _MAGIC or nbytes > MAX_MESSAGE_NBYTES:
                raise PeerProtocolError(self.address, "it sent what is no message of a group")
            payload = bytes(self._wire.receive(nbytes, in_time))
        # before anything of it is parsed; in constant time, so that a MAC cannot be guessed
        if not hmac.compare_digest(mac, self._mac(self._theirs, self._received, payload)):
            raise PeerRefused(self.address, "TokenInvalid: the other side does not have our secret")
        self._received += 1
        try:
            message = json.loads(payload)
        except (ValueError, RecursionError) as error:
            raise PeerProtocolError(self.address, "it sent a message that is no JSON") from error
        if not isinstance(message, dict):
            raise PeerProtocolError(self.address, "it sent a message that is no JSON object")
        return message

    def hang_up(self) -> None:
        """Wake whoever waits in it, in any thread."""
        self._wire.hang_up()

    def close(self) -> None:
        """End the connection. It may be called twice."""
        self._wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _mac(self, direction: bytes, number: int, payload: bytes) -> bytes:
        return hmac.digest(
            self._key, direction + number.to_bytes(8, "big") + payload, hashlib.sha256
        )


class _WireErrors:
    """What goes wrong on the wire, in the words of peers."""

    def __init__(self, address: str) -> None:
        self._address = address

    def __enter__(self) -> None:
        return

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, ConnectionBroken):
            raise PeerUnreachable(self._address, str(error)) from error
        if isinstance(error, DeadlinePassed):
            raise PeerTimeout(self._address, str(error)) from error
