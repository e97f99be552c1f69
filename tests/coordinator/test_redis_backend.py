"""The coordinator's state in a real Redis, and the settings that lead there."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hotweights_coordinator.backends.base import Fenced, Unavailable
from hotweights_coordinator.backends.redis import RedisBackend, RedisSettings, RedisSettingsError
from hotweights_coordinator.state.state import (
    Attempt,
    CoordinatorState,
    Current,
    Event,
    PlanRef,
    Worker,
)
from tests.coordinator.ha.redis_server import RedisServer

LEASE_SECONDS = 60.0  # nobody waits for its end here, and a third of it is what an answer may take
PLAN = PlanRef("sha256:plan", "v2", "sha256:manifest", "file:///w", "m", 10)
STATE = CoordinatorState(
    token=7,
    plan=PLAN,
    attempt=Attempt(7, "precommitted", PLAN, 12.5, precommits=frozenset({"w1", "w2"})),
    current=Current("v1", "sha256:old", 3, "sha256:oldplan", "file:///v1", "m"),
    workers={"w1": Worker("w1", "host", ("tcp://h:1",), "zone", "i1"), "w2": Worker("w2", "host")},
    events=(Event(1.5, "begin", "begun", "v2", "sha256:manifest", 7),),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def pair(
    server: RedisServer, request: pytest.FixtureRequest
) -> AsyncIterator[tuple[RedisBackend, RedisBackend]]:
    settings = RedisSettings(server.url, request.node.name, LEASE_SECONDS)
    backends = RedisBackend(settings), RedisBackend(settings)
    yield backends
    for one in backends:
        await one.close()


async def test_what_one_stored_the_next_loads(pair: tuple[RedisBackend, RedisBackend]) -> None:
    a, b = pair
    lease = await a.lead("a", "tcp://a:1")
    assert await a.load() is None
    await a.store(STATE, lease)
    assert await b.load() == STATE
    await a.store(replace(STATE, token=8, attempt=None), lease)
    await a.release(lease)
    assert (await b.lead("b", "tcp://b:1")).mine
    assert await b.load() == replace(STATE, token=8, attempt=None)


async def test_an_old_leaders_state_is_not_stored(pair: tuple[RedisBackend, RedisBackend]) -> None:
    a, b = pair
    old = await a.lead("a", "tcp://a:1")
    await a.load()
    await a.release(old)
    new = await b.lead("b", "tcp://b:1")
    await b.load()
    await b.store(STATE, new)
    with pytest.raises(Fenced):
        await a.store(replace(STATE, token=9), old)
    assert await b.load() == STATE


async def test_blobs_that_no_state_names_go_with_the_next_leader(
    pair: tuple[RedisBackend, RedisBackend],
) -> None:
    a, b = pair
    lease = await a.lead("a", "tcp://a:1")
    await a.load()
    await a.put_blob(PLAN.digest, b"plan")
    await a.put_blob("sha256:never named", b"x")
    await a.store(STATE, lease)
    await a.load()
    assert await a.get_blob("sha256:never named") == b"x"  # it might be about to be named
    await a.release(lease)
    await b.lead("b", "tcp://b:1")
    await b.load()
    assert await b.get_blob("sha256:never named") is None
    assert await b.get_blob(PLAN.digest) == b"plan"


async def test_tokens_grow_even_when_redis_forgot_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = RedisServer(tmp_path)
    server.start()
    backend = RedisBackend(RedisSettings(server.url, "grow", LEASE_SECONDS))
    try:
        lease = await backend.lead("a", "tcp://a:1")
        await backend.load()
        await backend.store(STATE, lease)
        server.stop(signal.SIGKILL)
        server.forget()
        with pytest.raises(Unavailable):
            await backend.load()
        server.start()
        await asyncio.sleep(0)
        lease = await backend.lead("a", "tcp://a:1")
        assert (lease.mine, lease.fence) == (True, 2)
        assert await backend.load() == CoordinatorState(token=7)
        assert "decisions up to token 7 are gone" in caplog.text
        await backend.store(CoordinatorState(token=8), lease)
        assert await backend.load() == CoordinatorState(token=8)
    finally:
        await backend.close()
        server.stop()


async def test_a_redis_that_forgets_is_warned_of(
    server: RedisServer, pair: tuple[RedisBackend, RedisBackend], caplog: pytest.LogCaptureFixture
) -> None:
    server.configure("appendfsync", "everysec")
    await pair[0].lead("a", "tcp://a:1")
    server.configure("appendfsync", "always")
    assert "so a crash loses the last commits" in caplog.text


def test_settings_come_from_the_environment() -> None:
    assert RedisSettings.read({}) == RedisSettings("redis://127.0.0.1:6379/0", "default", 5.0)
    given = {
        "HOTWEIGHTS_REDIS_URL": "redis://r:1/2",
        "HOTWEIGHTS_COORD_CLUSTER": "c",
        "HOTWEIGHTS_COORD_LEASE_SECONDS": "2",
    }
    assert RedisSettings.read(given) == RedisSettings("redis://r:1/2", "c", 2.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HOTWEIGHTS_COORD_CLUSTER", "a/b"),
        ("HOTWEIGHTS_COORD_LEASE_SECONDS", "soon"),
        ("HOTWEIGHTS_COORD_LEASE_SECONDS", "nan"),
        ("HOTWEIGHTS_COORD_LEASE_SECONDS", "0"),
    ],
)
def test_a_setting_that_says_nothing_is_named(name: str, value: str) -> None:
    with pytest.raises(RedisSettingsError, match=name):
        RedisSettings.read({name: value})


@pytest.mark.parametrize("url", ["127.0.0.1:6379", "http://127.0.0.1", "redis://h:port/0"])
def test_an_address_that_is_none_is_named(url: str) -> None:
    with pytest.raises(RedisSettingsError, match="HOTWEIGHTS_REDIS_URL"):
        RedisBackend(RedisSettings(url))
