"""What can go wrong between us and the API server, as our own exceptions.

Callers decide by type, people by the message, which names the object and says what to do next::

    KubeError
    ├── Conflict        somebody else wrote in between: read again, decide again
    │   └── AlreadyExists   create found one of that name
    ├── NotFound        no such object, or the resource definition is not installed
    ├── Forbidden       the identity may not do that: RBAC, an admission policy, or an expired token
    ├── Invalid         the API server will never take this body: our defect, or the user's input
    ├── Unavailable     nobody answered in time, or not now: try again after `retry_after_seconds`
    ├── Expired         a watch's resourceVersion is too old: list again
    ├── TokenRefused    a token review said no
    └── NotConfigured   neither a kubeconfig nor a pod's service account was found
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

from hotweights_common.errors import HotweightsError

MAX_RETRY_AFTER_SECONDS = 60.0
"""A server, or something before it, that asks for more patience than this is asked again all the
same.
"""


class KubeError(HotweightsError):
    """Anything that the API server or the way to it refused."""


class Conflict(KubeError):
    """Somebody else wrote in between, or another field manager owns the field."""


class AlreadyExists(Conflict):
    """An object of that name is there."""


class NotFound(KubeError):
    """No such object or no such resource."""


class Forbidden(KubeError):
    """The identity may not do that."""


class Invalid(KubeError):
    """The body will never be taken as it is."""


class Expired(KubeError):
    """The resourceVersion that a watch or a list went on from is gone."""


class TokenRefused(KubeError):
    """A token is not what it should be."""


class NotConfigured(KubeError):
    """No way to an API server was found."""


class Unavailable(KubeError):
    """Nobody answered in time, or not now."""

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


def wait_seconds(error: BaseException) -> float | None:
    """How long the API server asked to be left alone, when it said so together with this error."""
    return error.retry_after_seconds if isinstance(error, Unavailable) else None


_INVALID = {
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.METHOD_NOT_ALLOWED,
    HTTPStatus.NOT_ACCEPTABLE,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    HTTPStatus.UNPROCESSABLE_ENTITY,
}


def from_response(
    request: str, status: int, content: bytes, headers: Mapping[str, str]
) -> KubeError:
    """The exception for an answer that is not a success; ``request`` is what was asked, for the
    message.
    """
    said = _status(content)
    message = f"{request}: {said.get('message') or f'HTTP {status}'}"
    if status == HTTPStatus.NOT_FOUND:
        return NotFound(f"{message}. If the kind itself is unknown, install the CRDs (crds/*.yaml)")
    if status == HTTPStatus.CONFLICT and said.get("reason") == "AlreadyExists":
        return AlreadyExists(message)
    if status == HTTPStatus.CONFLICT:
        return Conflict(f"{message}. Read the object again and decide again")
    if status == HTTPStatus.GONE:
        return Expired(f"{message}. List again")
    if status == HTTPStatus.UNAUTHORIZED:
        return Forbidden(
            f"{message}. The credentials are missing, wrong or expired: renew the kubeconfig or "
            "the token"
        )
    if status == HTTPStatus.FORBIDDEN:
        return Forbidden(f"{message}. Grant it in RBAC, or see which admission policy said no")
    if status in _INVALID:
        return Invalid(message)
    return Unavailable(f"{message}. It is tried again", _retry_after(headers, said))


def _status(content: bytes) -> dict[str, Any]:
    """The Status object in an answer's body, if it is one."""
    try:
        body = json.loads(content)
    except ValueError:
        # not the API server's own words: the first of them may tell whose they are
        return {"message": content[:200].decode(errors="replace").strip()}
    return body if isinstance(body, dict) else {}


def _retry_after(headers: Mapping[str, str], said: Mapping[str, Any]) -> float | None:
    """Seconds, as a number or as the date when it may be tried again (RFC 9110, section 10.2.3), in
    the header or (errors in a watch have none) the Status.
    """
    value = str(
        headers.get("Retry-After") or (said.get("details") or {}).get("retryAfterSeconds") or ""
    )
    try:
        seconds = float(value)
    except ValueError:
        seconds = _seconds_until(value)
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS) if math.isfinite(seconds) else None


def _seconds_until(date: str) -> float:
    """How far off an HTTP date is; not a number if it is none."""
    try:
        moment = parsedate_to_datetime(date)
    except ValueError:
        return math.nan
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (aware - datetime.now(UTC)).total_seconds()
