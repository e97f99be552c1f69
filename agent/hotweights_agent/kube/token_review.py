"""Who is at the other end: tokens reviewed by the API server, for engines and for peers.

The token is the whole authentication: sockets are open to everybody on the node and the network.
Answers are kept by the token's hash, for a short while, so that an engine's many processes cost one
review; while the API server is away an answer counts on until the token itself expires, so that a
restarted container gets through. Refusals are kept for a moment too, and tokens that were never
accepted have a rate of their own, so that strangers who knock without end become no load on the API
server and keep nobody waiting who is known. A new token that says that it is of a pod of this node
comes before them: that is not verified yet, so it buys a turn and nothing else. No token is ever
logged or stored, only its hash.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from hotweights_agent.engines.socket_auth import AuthenticationUnavailable, Unauthenticated
from hotweights_agent.session.messages import Pod
from hotweights_agent.session.retry import TokenBucket
from hotweights_common.few_lines import FewLines
from hotweights_common.reasons import Reason
from hotweights_kube.errors import KubeError, TokenRefused
from hotweights_kube.token_review import Identity
from hotweights_transports.peers import base as peers

log = logging.getLogger(__name__)
log.addFilter(FewLines())

MAX_TOKEN_CHARACTERS = 16 * 1024  # service-account tokens have a tenth of that
MAX_CACHED = 2048  # of either kind; the oldest goes, and whoever asks again costs a review
REVIEWS_AT_ONCE = 8  # of strangers' tokens, and as many of those that go first
UNKNOWN_PER_SECOND = 20  # a pod needs one review in the life of its token
UNKNOWN_AT_ONCE = 256  # after the agent's start all pods of its node come at once
UNKNOWN_WAIT_SECONDS = 5.0  # whoever would wait longer is told to come again
# of each pod that is here, before its tokens wait among those of strangers: a container that
# restarts, or a kubelet that renews its token. A stranger would have to know the pod's UID
EXPECTED_PER_SECOND = 0.5
EXPECTED_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class _Known:
    identity: Identity | None  # None: refused
    message: str
    fresh_until: float
    expires_at: float


class TokenReviews:
    """Token reviews for one audience, remembered."""

    def __init__(
        self,
        review: Callable[[str], Awaitable[Identity]],
        clock: Callable[[], float],
        *,
        fresh_seconds: float = 120.0,
        refused_seconds: float = 10.0,
        counted: Callable[[str], None] = lambda _result: None,
    ) -> None:
        """``clock`` is seconds since the epoch, because tokens say when they expire; ``counted``
        hears of each review.
        """
        self._review = review
        self._clock = clock
        self._fresh_seconds = fresh_seconds
        self._refused_seconds = refused_seconds
        self._counted = counted
        self._accepted: OrderedDict[str, _Known] = OrderedDict()
        # apart, or strangers who are refused without end would push out those who are known
        self._refused: OrderedDict[str, _Known] = OrderedDict()
        self._asking: dict[str, asyncio.Task[_Known]] = {}
        self._places = {first: asyncio.Semaphore(REVIEWS_AT_ONCE) for first in (False, True)}
        self._unknown = TokenBucket(UNKNOWN_PER_SECOND, UNKNOWN_AT_ONCE, time.monotonic())
        self._is_here: Callable[[str], bool] = lambda _uid: False
        self._expected: dict[str, TokenBucket] = {}  # by the UIDs of pods that are here

    def expect(self, is_here: Callable[[str], bool]) -> None:
        """Tokens of pods of which this is so have a turn of their own."""
        self._is_here = is_here

    async def identity(self, token: str) -> Identity:
        """Who that is. Raises `Unauthenticated` or `AuthenticationUnavailable`."""
        if not token or len(token) > MAX_TOKEN_CHARACTERS or not token.isascii():
            raise Unauthenticated(
                Reason.TOKEN_INVALID,
                "no token, or nothing that could be one: see HOTWEIGHTS_TOKEN_FILE",
            )
        key = hashlib.sha256(token.encode()).hexdigest()
        known = self._accepted.get(key) or self._refused.get(key)
        if known is None or self._clock() >= known.fresh_until:
            known = await self._ask_once(key, token, known)
        if known.identity is None:
            raise Unauthenticated(Reason.TOKEN_INVALID, known.message)
        return known.identity

    async def _ask_once(self, key: str, token: str, stale: _Known | None) -> _Known:
        """One review for all who ask at the same time."""
        task = self._asking.get(key)
        if task is None:
            # shielded below: one caller's end must not take the answer from the others
            is_known = stale is not None and stale.identity is not None
            goes_first = is_known or self._is_expected(token)
            task = self._asking[key] = asyncio.create_task(self._ask(token, goes_first))
            task.add_done_callback(lambda _done: self._asking.pop(key, None))
        try:
            known = await asyncio.shield(task)
        except AuthenticationUnavailable:
            if (
                stale is not None
                and stale.identity is not None
                and self._clock() < stale.expires_at
            ):
                log.info(
                    "%s is believed on: no review is possible now and the token is still valid",
                    stale.identity.username,
                )
                return stale
            raise
        self._accepted.pop(key, None)
        self._refused.pop(key, None)
        table = self._accepted if known.identity is not None else self._refused
        table[key] = known
        while len(table) > MAX_CACHED:
            table.popitem(last=False)
        return known

    async def _ask(self, token: str, goes_first: bool) -> _Known:
        if not goes_first:
            await self._turn_of_unknown()
        async with self._places[goes_first]:
            now = self._clock()
            try:
                identity = await self._review(token)
            except TokenRefused as error:
                self._counted("refused")
                return _Known(None, str(error), now + self._refused_seconds, 0.0)
            except KubeError as error:
                self._counted("unavailable")
                raise AuthenticationUnavailable(
                    f"the token could not be reviewed: {error}"
                ) from error
        self._counted("accepted")
        expires_at = expiry_of(token)
        return _Known(
            identity,
            "",
            min(now + self._fresh_seconds, expires_at or now + self._fresh_seconds),
            expires_at,
        )

    def _is_expected(self, token: str) -> bool:
        uid, now = pod_uid_of(token), time.monotonic()
        if not uid or not self._is_here(uid):
            return False
        if uid not in self._expected:
            # a new pod is the occasion: full buckets are forgotten, so the table stays small
            self._expected = {u: b for u, b in self._expected.items() if not b.is_full(now)}
            self._expected[uid] = TokenBucket(EXPECTED_PER_SECOND, EXPECTED_AT_ONCE, now)
        bucket = self._expected[uid]
        if bucket.wait_seconds(now) > 0.0:
            return False
        bucket.take()
        return True

    async def _turn_of_unknown(self) -> None:
        wait = self._unknown.wait_seconds(time.monotonic())  # `clock` may jump
        if wait > UNKNOWN_WAIT_SECONDS:
            self._counted("deferred")
            raise AuthenticationUnavailable(
                f"more than {UNKNOWN_PER_SECOND} unknown tokens a second are shown here"
            )
        self._unknown.take()
        await asyncio.sleep(wait)


class EngineAuthenticator:
    """Lets in the pods of this node."""

    def __init__(self, reviews: TokenReviews, node: str) -> None:
        self._reviews = reviews
        self._node = node

    async def authenticate(self, token: str) -> Pod:
        """The pod behind the token. Raises `Unauthenticated` or `AuthenticationUnavailable`."""
        identity = await self._reviews.identity(token)
        if not identity.pod_uid or not identity.pod_name:
            text = (
                f"{identity.username}'s token is bound to no pod; mount a projected "
                "service-account token"
            )
            raise Unauthenticated(Reason.TOKEN_INVALID, text)
        # the token says it itself (KEP-4193); pods of other nodes have no business here
        if identity.node_name != self._node:
            where = identity.node_name or "no node"
            raise Unauthenticated(
                Reason.NOT_THIS_NODE,
                f"pod {identity.pod_name} is on {where}; this is the agent of {self._node}",
            )
        return Pod(identity.pod_uid, identity.namespace, identity.pod_name)


class PeerAuthenticator:
    """Lets in the other agents: for the peers' server, whose threads may wait."""

    def __init__(
        self,
        reviews: TokenReviews,
        loop: asyncio.AbstractEventLoop,
        username: Callable[[], str],
        timeout_seconds: float = 20.0,
    ) -> None:
        """``username``: the agents' service account, as their own token names it."""
        self._reviews = reviews
        self._loop = loop
        self._username = username
        self._timeout_seconds = timeout_seconds

    def __call__(self, token: str) -> peers.Identity | None:
        """Who the peer is; None: nobody who may pull. Raises `AuthenticationUnavailable`. Called
        from a thread of the peers' server, never from the loop, for which it waits.
        """
        asked = asyncio.run_coroutine_threadsafe(self._reviews.identity(token), self._loop)
        try:
            identity = asked.result(self._timeout_seconds)
        except Unauthenticated as error:
            log.warning("a peer was refused: %s", error)
            return None
        except (
            AuthenticationUnavailable,
            concurrent.futures.TimeoutError,
            concurrent.futures.CancelledError,
        ) as error:
            asked.cancel()
            raise peers.AuthenticationUnavailable(str(error) or "no answer in time") from error
        expected = self._username()
        if not expected or identity.username != expected:
            log.warning(
                "a peer was refused: %s is not the agents' %s",
                identity.username,
                expected or "(unknown)",
            )
            return None
        return peers.Identity(identity.username, identity.node_name)


def claims_of(token: str) -> dict[str, object]:
    """What a token says of itself, unverified: for expiry and our own name, never for who somebody
    else is.
    """
    parts = token.split(".")
    if len(parts) != 3:  # header, claims, signature (RFC 7519)
        return {}
    try:
        body = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def pod_uid_of(token: str) -> str:
    """Of which pod the token says that it is (KEP-1205: ``kubernetes.io``); empty: of none."""
    place: object = claims_of(token)
    for key in ("kubernetes.io", "pod", "uid"):
        place = place.get(key) if isinstance(place, dict) else None
    return place if isinstance(place, str) else ""


def expiry_of(token: str) -> float:
    """When the token expires, in seconds since the epoch; 0 when it does not say."""
    expires = claims_of(token).get("exp")
    return (
        float(expires)
        if isinstance(expires, int | float) and not isinstance(expires, bool)
        else 0.0
    )
