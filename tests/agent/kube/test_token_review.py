"""Who a token belongs to, and whose review comes first."""

from __future__ import annotations

import asyncio
import base64
import json
from types import SimpleNamespace

import pytest

from hotweights_agent.engines.socket_auth import AuthenticationUnavailable, Unauthenticated
from hotweights_agent.kube import token_review
from hotweights_agent.kube.token_review import (
    EXPECTED_AT_ONCE,
    UNKNOWN_AT_ONCE,
    UNKNOWN_PER_SECOND,
    EngineAuthenticator,
    TokenReviews,
    pod_uid_of,
)
from hotweights_agent.session.messages import Pod
from hotweights_kube.errors import TokenRefused, Unavailable
from hotweights_kube.token_review import Identity


def identity(node: str = "node-a", uid: str = "uid-1") -> Identity:
    return Identity(
        "system:serviceaccount:ns:default",
        "ns",
        "default",
        ("hotweights-agent",),
        "vllm-0",
        uid,
        node,
    )


class Api:
    def __init__(self, answer: Identity | Exception) -> None:
        self.answer, self.pending, self.time = answer, 0, 1000.0

    async def review(self, token: str) -> Identity:
        self.pending += 1
        await asyncio.sleep(0)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def reviews(self) -> TokenReviews:
        return TokenReviews(self.review, lambda: self.time, fresh_seconds=60.0, refused_seconds=5.0)


TOKEN = "e30.eyJleHAiOiAyMDAwfQ.sig"  # expires at 2000


async def test_one_review_for_all_processes_of_an_engine() -> None:
    api = Api(identity())
    door = EngineAuthenticator(api.reviews(), "node-a")
    pods = await asyncio.gather(*(door.authenticate(TOKEN) for _ in range(9)))
    assert set(pods) == {Pod("uid-1", "ns", "vllm-0")}
    assert api.pending == 1


async def test_a_pod_of_another_node_is_refused() -> None:
    with pytest.raises(Unauthenticated, match="is on node-b") as caught:
        await EngineAuthenticator(Api(identity("node-b")).reviews(), "node-a").authenticate(TOKEN)
    assert caught.value.reason == "NotThisNode"


async def test_a_token_that_is_bound_to_no_pod_is_refused() -> None:
    with pytest.raises(Unauthenticated, match="bound to no pod"):
        await EngineAuthenticator(Api(identity(uid="")).reviews(), "node-a").authenticate(TOKEN)


async def test_a_refusal_is_remembered_for_a_moment_only() -> None:
    api = Api(TokenRefused("no"))
    reviews = api.reviews()
    for _ in range(3):
        with pytest.raises(Unauthenticated):
            await reviews.identity(TOKEN)
    assert api.pending == 1
    api.time, api.answer = 1006.0, identity()
    assert (await reviews.identity(TOKEN)).pod_uid == "uid-1"


async def test_while_the_api_server_is_away_a_known_token_counts_until_it_expires() -> None:
    api = Api(identity())
    reviews = api.reviews()
    await reviews.identity(TOKEN)
    api.time, api.answer = 1900.0, Unavailable("away")
    assert (await reviews.identity(TOKEN)).pod_uid == "uid-1"
    api.time = 2001.0
    with pytest.raises(AuthenticationUnavailable):
        await reviews.identity(TOKEN)
    with pytest.raises(AuthenticationUnavailable):
        await reviews.identity("e30.e30.other")


async def test_strangers_who_are_refused_push_out_nobody_who_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hotweights_agent.kube.token_review.MAX_CACHED", 4)
    api = Api(identity())
    reviews = api.reviews()
    await reviews.identity(TOKEN)
    api.answer = TokenRefused("no")
    for number in range(20):
        with pytest.raises(Unauthenticated):
            await reviews.identity(f"e30.e30.{number}")
    api.time, api.answer = 1900.0, Unavailable("away")
    assert (await reviews.identity(TOKEN)).pod_uid == "uid-1"


@pytest.mark.parametrize("token", ["", "x" * 20000, "töken"])
async def test_what_cannot_be_a_token_is_not_even_reviewed(token: str) -> None:
    api = Api(identity())
    with pytest.raises(Unauthenticated):
        await api.reviews().identity(token)
    assert api.pending == 0


async def test_unknown_tokens_are_reviewed_only_so_fast_and_known_ones_need_not_wait() -> None:
    api = Api(identity())
    reviews = api.reviews()
    await reviews.identity(TOKEN)
    api.time += 100  # what was known is to be asked anew

    async def refuse(token: str) -> Identity:
        api.pending += 1
        if token == TOKEN:
            return identity()
        raise TokenRefused("no")

    reviews._review = refuse
    began = asyncio.get_running_loop().time()
    strangers = [asyncio.create_task(reviews.identity(f"random-{n}")) for n in range(1000)]
    await asyncio.sleep(0)
    assert (await asyncio.wait_for(reviews.identity(TOKEN), 30)).pod_uid == "uid-1"
    told = await asyncio.wait_for(asyncio.gather(*strangers[-1:], return_exceptions=True), 30)
    assert isinstance(told[0], AuthenticationUnavailable), "it is told to come again"
    elapsed = asyncio.get_running_loop().time() - began
    assert api.pending <= UNKNOWN_AT_ONCE + UNKNOWN_PER_SECOND * elapsed + 3
    for task in strangers:
        task.cancel()
    await asyncio.gather(*strangers, return_exceptions=True)


def token_of(uid: str, number: int) -> str:
    """As the kubelet projects one, but for the signature."""
    claims = json.dumps({"exp": 2000 + number, "kubernetes.io": {"pod": {"uid": uid}}})
    return f"e30.{base64.urlsafe_b64encode(claims.encode()).decode().rstrip('=')}.sig"


async def test_new_tokens_of_pods_that_are_here_do_not_wait_among_those_of_strangers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One who shows ever new tokens once kept a pod that started waiting for 24 s."""
    # no turn comes back while a slow machine gets this far
    monkeypatch.setattr(token_review, "time", SimpleNamespace(monotonic=lambda: 0.0))
    api = Api(identity())
    reviews = api.reviews()
    reviews.expect({"uid-1"}.__contains__)
    many = UNKNOWN_AT_ONCE + 20 * UNKNOWN_PER_SECOND
    strangers = [
        asyncio.create_task(reviews.identity(token_of("elsewhere", n))) for n in range(many)
    ]
    await asyncio.sleep(0)
    for number in range(EXPECTED_AT_ONCE):
        found = await asyncio.wait_for(reviews.identity(token_of("uid-1", number)), 30)
        assert found.pod_uid == "uid-1"
    with pytest.raises(AuthenticationUnavailable):
        await reviews.identity(token_of("uid-1", EXPECTED_AT_ONCE))  # what is left is everybody's
    for task in strangers:
        task.cancel()
    await asyncio.gather(*strangers, return_exceptions=True)


@pytest.mark.parametrize(
    "claims", [b"[]", b'"x"', b'{"kubernetes.io": 1}', b'{"kubernetes.io": {"pod": {"uid": 7}}}']
)
def test_a_token_may_say_anything_of_itself(claims: bytes) -> None:
    assert pod_uid_of(f"e30.{base64.urlsafe_b64encode(claims).decode()}.sig") == ""
