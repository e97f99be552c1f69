"""What the engines' socket asks of whoever knows tokens: whose is this one?

The API server answers it in a cluster (`token_review`), a file beside the socket does without one.
This module knows neither.
"""

from __future__ import annotations

from typing import Protocol

from hotweights_agent.session.messages import Pod


class Unauthenticated(Exception):
    """The token proves nobody who may enter. ``reason`` is one CamelCase word."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class AuthenticationUnavailable(Exception):
    """Nobody could be asked; the token may be good."""


class Authenticator(Protocol):
    """Who knows tokens. The socket server asks it once for each connection, after the hello."""

    async def authenticate(self, token: str) -> Pod:
        """The pod behind the token. Raises `Unauthenticated` or `AuthenticationUnavailable`."""
        ...
