"""Who may come in: engines with the token that lies beside the socket, peers that know the group's
secret.

Whoever can read the token file is this host's user, and that is the whole of an engine's
authentication. Several engines of one host tell themselves apart by a name behind the token,
``<token>:<name>``, in a token file of their own. Peers show an HMAC of the secret, never the
secret; without any secret nobody listens beyond this host.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from hotweights_agent.engines.socket_auth import Unauthenticated
from hotweights_agent.session.messages import Pod
from hotweights_common.reasons import Reason
from hotweights_transports.peers.base import TOKEN_AUDIENCE, Identity

TOKEN_FILE = "engine.token"
PEER_VARIABLE = "HOTWEIGHTS_PEER_TOKEN"
NAMESPACE = "local"  # a host without Kubernetes has one tenant
ONLY_ENGINE = "engine"  # the name of one that gives none

# at most 63 characters, as Kubernetes has it for labels: it stands where a pod's name does
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class LocalEngineAuthenticator:
    """`Authenticator` of the engines' socket: the worker's own token, compared in constant time."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def authenticate(self, token: str) -> Pod:
        """The engine behind the token. Raises `Unauthenticated`."""
        given, _, name = token.partition(":")
        if not hmac.compare_digest(given.encode("utf-8", "surrogatepass"), self._token.encode()):
            text = (
                "the token is not this worker's; let HOTWEIGHTS_TOKEN_FILE name the file "
                f"{TOKEN_FILE} beside its socket"
            )
            raise Unauthenticated(Reason.TOKEN_INVALID, text)
        name = name or ONLY_ENGINE
        if not _NAME.fullmatch(name):
            raise Unauthenticated(
                Reason.TOKEN_INVALID,
                "the engine's name behind the token is not letters, digits, '.', '_', '-'",
            )
        return Pod(name, NAMESPACE, name)


def engine_token(folder: Path) -> str:
    """The token in ``folder``; a new one if there is none, so that engines outlive the worker.
    Raises OSError. The file is this user's alone (mode 0600).
    """
    path = folder / TOKEN_FILE
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        path.chmod(0o600)  # before it is trusted: somebody may have made it readable
        token = path.read_text().strip()
        if token:
            return token
        # it is there and empty: whoever made it ended before it was written
        descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    token = secrets.token_urlsafe(32)  # 256 bits
    with os.fdopen(descriptor, "w") as file:
        file.write(token + "\n")
    return token


class PeerSecret:
    """What one worker shows to another, and what it takes from it."""

    def __init__(self, secret: str) -> None:
        """Empty: everybody on this host is let in."""
        self.protected = bool(secret)
        self._shown = (
            hmac.new(secret.encode(), TOKEN_AUDIENCE.encode(), hashlib.sha256).hexdigest()
            if secret
            else "open"
        )

    def token(self) -> str:
        """What is shown to other workers: an HMAC, or a word that all have where there is no
        secret.
        """
        return self._shown

    def __call__(self, token: str) -> Identity | None:
        """Who shows this token, in constant time; None: nobody whom we know. A
        `peers.base.Authenticate`, called from the peer server's threads.
        """
        same = hmac.compare_digest(token.encode("utf-8", "surrogatepass"), self._shown.encode())
        return Identity("worker") if same else None


def peer_secret(coordinator_token: str) -> str:
    """What all workers of the group know: their own variable, else what follows from the
    coordinator's token.
    """
    given = os.environ.get(PEER_VARIABLE, "")
    if given or not coordinator_token:
        return given
    return hmac.new(coordinator_token.encode(), b"hotweights-peers", hashlib.sha256).hexdigest()
