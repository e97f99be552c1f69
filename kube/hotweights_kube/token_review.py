"""Who is behind a service-account token, as the API server says. It caches nothing: for how long an
answer counts is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hotweights_kube.errors import TokenRefused
from hotweights_kube.resources import TOKEN_REVIEWS, Body, Resource

_EXTRA = "authentication.kubernetes.io/"


class Reviewer(Protocol):
    """What a token review needs of the API."""

    async def post(self, resource: Resource, body: Body) -> Body:
        """Ask for a review, as `client.Api.post` does."""
        ...


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a token speaks for. The pod and the node are empty unless the token is bound to a pod;
    the node also where the API server does not tell it (KEP-4193: Kubernetes 1.30 and later do).
    """

    username: str  # system:serviceaccount:<namespace>:<name>
    namespace: str
    service_account: str
    audiences: tuple[str, ...]
    pod_name: str = ""
    pod_uid: str = ""
    node_name: str = ""


async def review(api: Reviewer, token: str, audiences: Sequence[str]) -> Identity:
    """The identity behind a token that was issued for one of these audiences. Raises `TokenRefused`
    otherwise, and another `KubeError` when the API server could not be asked.
    """
    answer = await api.post(TOKEN_REVIEWS, {"spec": {"token": token, "audiences": list(audiences)}})
    status = answer.get("status", {})
    wanted = " or ".join(audiences)
    if not status.get("authenticated"):
        raise TokenRefused(
            f"the token is not valid for {wanted}: {status.get('error') or 'not authenticated'}"
        )
    granted = tuple(status.get("audiences") or ())
    # an API server that knows no audiences says yes to any token, and leaves them out
    if not set(granted) & set(audiences):
        raise TokenRefused(
            f"the token is meant for {', '.join(granted) or 'nobody'}, not for {wanted}"
        )
    user = status.get("user", {})
    extra = user.get("extra") or {}
    username = str(user.get("username", ""))
    namespace, service_account = _service_account(username)
    return Identity(
        username=username,
        namespace=namespace,
        service_account=service_account,
        audiences=granted,
        pod_name=_first(extra.get(f"{_EXTRA}pod-name")),
        pod_uid=_first(extra.get(f"{_EXTRA}pod-uid")),
        node_name=_first(extra.get(f"{_EXTRA}node-name")),
    )


def _service_account(username: str) -> tuple[str, str]:
    parts = username.split(":")
    return (
        (parts[2], parts[3])
        if parts[:2] == ["system", "serviceaccount"] and len(parts) == 4
        else ("", "")
    )


def _first(values: list[str] | None) -> str:
    return values[0] if values else ""
