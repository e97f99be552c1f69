"""Who may ask: whoever knows the token, or whose CURVE key lies in the folder.

A token alone is never sent: the keys of both sides follow from it, so whoever does not know it gets
no word through the handshake (CURVE, https://rfc.zeromq.org/spec/26), and nobody on the way reads
any. With keys from a folder it is asked for as well, inside what they encrypt.

A folder of keys, as ``hotweights coord-keys`` writes it: ``server.key`` and ``server.key_secret``
for the coordinator, ``client.key_secret`` for those who ask, ``clients/*.key`` the public keys that
are let in. A client needs only ``server.key`` and ``client.key_secret``.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hotweights_common import hosts
from hotweights_common.reasons import Reason
from hotweights_coordinator.wire import address
from hotweights_coordinator.wire.messages import CallRefused

TOKEN_VARIABLE = "HOTWEIGHTS_COORD_TOKEN"
MAX_TOKEN_NBYTES = 4096  # a larger file is not the one that was meant


def read_token(token_file: Path | None) -> str:
    """From the file, else from the environment; empty: none. Raises `CallRefused` for a file that
    holds none.
    """
    if token_file is None:
        return os.environ.get(TOKEN_VARIABLE, "")
    try:
        with token_file.open("rb") as file:
            text = file.read(MAX_TOKEN_NBYTES + 1)  # one more shows that there is too much
        token = text.decode().strip()
    except OSError as error:
        raise CallRefused(
            Reason.BAD_TOKEN,
            f"cannot read the token file {token_file}: {error.strerror}; name a file with one "
            f"secret word with --token-file, or set ${TOKEN_VARIABLE}",
        ) from error
    except UnicodeDecodeError as error:
        raise CallRefused(Reason.BAD_TOKEN, f"the token file {token_file} is no text") from error
    if not token or len(text) > MAX_TOKEN_NBYTES:
        what = "is empty" if not token else f"has more than {MAX_TOKEN_NBYTES} bytes"
        raise CallRefused(
            Reason.BAD_TOKEN, f"the token file {token_file} {what}; put one secret word into it"
        )
    return token


def not_taken(token: str, curve: Path | None) -> CallRefused:
    """Why a coordinator ends the handshake of a client that has these."""
    if curve is not None:
        text = (
            f"the coordinator takes no key of {curve}; name the folder of its keys with --curve, or "
            "leave --curve away where it has none"
        )
    elif token:
        text = (
            f"the token is not the coordinator's, or it asks for none; set ${TOKEN_VARIABLE} or name "
            "a --token-file with its token, or leave both away where it asks for none"
        )
    else:
        text = (
            f"the coordinator wants a token (or keys: --curve); set ${TOKEN_VARIABLE} or name a "
            "--token-file"
        )
    return CallRefused(Reason.UNAUTHENTICATED, text)


def check_token(expected: str, given: str) -> None:
    """Raises `CallRefused` unless they are the same; takes as long whatever differs."""
    if expected and not hmac.compare_digest(
        expected.encode(), given.encode("utf-8", "surrogatepass")
    ):
        what = (
            "the coordinator wants a token" if not given else "the token is not the coordinator's"
        )
        raise CallRefused(
            Reason.UNAUTHENTICATED, f"{what}; set ${TOKEN_VARIABLE} or name a --token-file"
        )


def check_binding(endpoint: str, protected: bool) -> None:
    """Nobody unknown may reach it from another host. Raises `CallRefused`."""
    if not protected and not hosts.is_loopback(address.parse(endpoint).host):
        raise CallRefused(
            Reason.UNPROTECTED,
            f"{endpoint} can be reached from other hosts, and anybody there could change what "
            "is served; set "
            f"${TOKEN_VARIABLE} (or --token-file), or give keys with --curve, or bind "
            "tcp://127.0.0.1",
        )


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """What a CURVE client needs: its own pair, and the server's public key, by which it knows the
    server (https://rfc.zeromq.org/spec/26).
    """

    public: bytes
    secret: bytes
    server: bytes

    @classmethod
    def read(cls, folder: Path) -> Self:
        public, secret = _pair(folder / "client.key_secret")
        return cls(public, secret, _pair(folder / "server.key", secret=False)[0])

    @classmethod
    def of(cls, token: str, folder: Path | None) -> Self | None:
        """Those of the folder, else those that follow from the token; None: neither is given."""
        if folder is not None:
            return cls.read(folder)
        return cls(*_of_token(token, "client"), _of_token(token, "server")[0]) if token else None

    def apply(self, socket: Any) -> None:
        socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = (
            self.public,
            self.secret,
            self.server,
        )


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """What a CURVE server needs; ``clients`` is the folder of the public keys that it lets in. None:
    whoever knows the server's public key, which is nowhere to be read and follows from the token.
    """

    public: bytes
    secret: bytes
    clients: Path | None

    @classmethod
    def read(cls, folder: Path) -> Self:
        public, secret = _pair(folder / "server.key_secret")
        clients = folder / "clients"
        if not any(clients.glob("*.key")):
            raise CallRefused(
                Reason.BAD_KEYS,
                f"{clients} holds no public key (*.key), so nobody could get in; {_REMEDY}",
            )
        return cls(public, secret, clients)

    @classmethod
    def of(cls, token: str, folder: Path | None) -> Self | None:
        """As `ClientKeys.of`."""
        if folder is not None:
            return cls.read(folder)
        return cls(*_of_token(token, "server"), None) if token else None

    def apply(self, socket: Any) -> None:
        socket.curve_publickey, socket.curve_secretkey, socket.curve_server = (
            self.public,
            self.secret,
            True,
        )


_REMEDY = "write keys with `hotweights coord-keys DIR`"


def _of_token(token: str, side: str) -> tuple[bytes, bytes]:
    """Public and secret key, as `zmq` writes them (Z85). Any 32 bytes are a secret key."""
    import zmq
    from zmq.utils import z85

    label = f"hotweights-coordinator-{side}".encode()
    digest = hmac.new(token.encode("utf-8", "surrogatepass"), label, hashlib.sha256).digest()
    secret: bytes = z85.encode(digest)
    return zmq.curve_public(secret), secret


def _pair(path: Path, secret: bool = True) -> tuple[bytes, bytes]:
    from zmq import auth as curve

    try:
        public, private = curve.load_certificate(path)
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CallRefused(
            Reason.BAD_KEYS, f"cannot read the key {path}: {text}; {_REMEDY}"
        ) from error
    if secret and private is None:
        raise CallRefused(Reason.BAD_KEYS, f"{path} holds no secret key; {_REMEDY}")
    return public, private or b""


def write_keys(folder: Path) -> None:
    """Two new key pairs. Refuses to write over any."""
    from zmq import auth as curve

    if (folder / "server.key_secret").exists() or (folder / "client.key_secret").exists():
        raise CallRefused(
            Reason.KEYS_EXIST,
            f"{folder} holds keys already; name another folder, or remove them first",
        )
    clients = folder / "clients"
    clients.mkdir(parents=True, exist_ok=True)
    mask = os.umask(0o077)  # secret keys are nobody else's to read
    try:
        curve.create_certificates(folder, "server")
        curve.create_certificates(folder, "client")
    finally:
        os.umask(mask)
    (folder / "client.key").replace(clients / "client.key")
