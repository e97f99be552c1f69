"""How a server proves that it is the one that a puller's route means, before the puller shows its
token to it.

The process that serves makes a key pair when it starts and publishes the public half beside its
endpoint; who plans routes copies both. A puller sends a nonce and the endpoint that it dialled; the
server signs both, if that endpoint is its own: so neither an old answer nor one that another server
gave (to whoever stands between) proves anything. Ed25519 (RFC 8032), because what is published then
is no secret: with an HMAC, whoever can read a NodeWeights could pose as that node.

It does not hide what follows: on a network that others can change, they may still read along.

This module knows keys and endpoints, and no frame. The library is imported where a key is made or
used, because most who pull without Kubernetes have neither.
"""

from __future__ import annotations

import base64
import binascii
import threading
from typing import Final

from hotweights_transports.peers.base import PeerUnproven
from hotweights_transports.peers.frames import NONCE_NBYTES

ALGORITHM: Final = "ed25519:"  # before the base64 of a key, so that another one may follow
LABEL: Final = b"hotweights peer proof 1\0"  # this key signs nothing else, nor that anything else


class ServerKey:
    """The key pair of one process; the private half never leaves it. Any thread may call it."""

    def __init__(self) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self._private = Ed25519PrivateKey.generate()
        self._lock = threading.Lock()
        self._endpoints: frozenset[str] = frozenset()
        public = self._private.public_key().public_bytes_raw()
        self.public = ALGORITHM + base64.b64encode(public).decode()
        """For others' routes: ``ed25519:`` and 44 characters of base64."""

    def serves_at(self, endpoint: str) -> None:
        """From now on that URI is one of this process's, as others are told of it."""
        with self._lock:
            self._endpoints |= {endpoint}

    def prove(self, nonce: bytes, endpoint: str) -> bytes | None:
        """As `Prove` wants it."""
        if endpoint not in self._endpoints:
            return None
        return self._private.sign(_signed(nonce, endpoint))


def check(endpoint: str, key: str, nonce: bytes, signature: bytes) -> None:
    """That whoever signed has the private half of ``key`` and says that ``endpoint``, which was
    dialled, is its own. Raises `PeerUnproven`.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        if not key.startswith(ALGORITHM):
            raise ValueError
        public = Ed25519PublicKey.from_public_bytes(
            base64.b64decode(key.removeprefix(ALGORITHM), validate=True)
        )
    except (ValueError, binascii.Error) as error:
        raise PeerUnproven(
            endpoint, f"the route's key {key!r} is none that this release knows: upgrade this agent"
        ) from error
    try:
        public.verify(signature, _signed(nonce, endpoint))
    except InvalidSignature as error:
        raise PeerUnproven(
            endpoint, "its signature is not by the key that the route names"
        ) from error


def _signed(nonce: bytes, endpoint: str) -> bytes:
    if len(nonce) != NONCE_NBYTES:  # else one text could be read as two
        raise ValueError(f"a nonce has {NONCE_NBYTES} bytes, not {len(nonce)}")
    return LABEL + nonce + endpoint.encode("utf-8", "surrogatepass")
