"""Leases and fenced writes, against a real redis-server."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis.asyncio

from hotweights.coordinator.redis import BackendUnavailable, Conflict, Fenced, RedisStore
from tests.hotweights.coordinator.ha.redis_server import RedisServer

LEASE_SECONDS = 30.0  # nobody waits for its end here: what should end is ended by hand


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


class Stores:
    """Makes stores, closes them, and looks past them into Redis."""

    def __init__(self, server: RedisServer, cluster: str) -> None:
        self.now, self.cluster = 0.0, cluster
        self._server = server
        self._made: list[RedisStore] = []
        self.raw = redis.asyncio.Redis.from_url(server.url)

    def new(self, name: str, lease_seconds: float = LEASE_SECONDS) -> RedisStore:
        store = RedisStore(
            self._server.url, self.cluster, name, f"tcp://{name}:5555", lease_seconds, clock=lambda: self.now
        )
        self._made.append(store)
        return store

    async def leader(self, name: str) -> RedisStore:
        store = self.new(name)
        assert (await store.acquire()).identity == name
        await store.load()
        return store

    async def end_lease(self) -> None:
        """As if its time had passed."""
        await self.raw.delete(f"hotweights/{self.cluster}/leader")

    async def close(self) -> None:
        for store in self._made:
            await store.close()
        await self.raw.aclose()


@pytest.fixture
async def stores(server: RedisServer, request: pytest.FixtureRequest) -> AsyncIterator[Stores]:
    stores = Stores(server, request.node.name)
    yield stores
    await stores.close()


async def test_one_leads_and_the_others_learn_who(stores: Stores) -> None:
    a, b = stores.new("a"), stores.new("b")
    first = await a.acquire()
    seen = await b.acquire()
    assert (first.identity, first.fence) == ("a", 1)
    assert (seen.identity, seen.fence, seen.endpoint) == ("a", 1, "tcp://a:5555")
    assert 0 < seen.remaining_seconds <= LEASE_SECONDS
    assert (a.leads(), b.leads()) == (True, False)
    assert (a.fence, b.fence) == (1, 0)


async def test_many_ask_at_once_and_one_gets_it(stores: Stores) -> None:
    candidates = [stores.new(f"c{number}") for number in range(20)]
    answers = await asyncio.gather(*(one.acquire() for one in candidates))
    assert len({(one.identity, one.fence) for one in answers}) == 1
    assert sum(one.leads() for one in candidates) == 1


async def test_an_endpoint_is_an_identity_without_colons_in_the_way(stores: Stores) -> None:
    store = stores.new("tcp://127.0.0.1:5555")
    await store.acquire()
    assert (await stores.new("b").acquire()).identity == "tcp://127.0.0.1:5555"


async def test_the_leader_stops_before_the_lease_ends(stores: Stores) -> None:
    store = await stores.leader("a")
    stores.now = LEASE_SECONDS * 0.89
    assert store.leads()
    stores.now = LEASE_SECONDS * 0.91
    assert not store.leads()
    await store.renew()
    assert store.leads()


async def test_the_lease_counts_from_when_it_was_asked_for(server: RedisServer, stores: Stores) -> None:
    store = await stores.leader("a")
    server.freeze()
    renewal = asyncio.create_task(store.renew())
    await asyncio.sleep(0.05)
    stores.now = LEASE_SECONDS  # the answer took as long as the lease
    server.thaw()
    await renewal
    assert not store.leads()


async def test_a_lease_given_back_is_free_at_once(stores: Stores) -> None:
    a = await stores.leader("a")
    await a.release()
    assert not a.leads()
    taken = await stores.new("b").acquire()
    assert (taken.identity, taken.fence) == ("b", 2)


async def test_a_lease_whose_grant_got_lost_is_found_again(stores: Stores) -> None:
    await stores.raw.set(f"hotweights/{stores.cluster}/leader", "a:7", px=20_000)
    a = stores.new("a")
    assert (await a.acquire()).fence == 7
    stores.now = 16.5
    assert a.leads()
    stores.now = 19.0  # it is as long as Redis says, not as a new one
    assert not a.leads()


async def test_nobody_gives_back_anothers_lease(stores: Stores) -> None:
    a = await stores.leader("a")
    await stores.end_lease()
    b = await stores.leader("b")
    await a.release()
    await b.renew()
    assert b.leads()


async def test_a_leader_that_slept_can_neither_renew_nor_write(stores: Stores) -> None:
    a = await stores.leader("a")
    await a.write({"state": b"begun"})
    await stores.end_lease()
    b = await stores.leader("b")
    await b.write({"state": b"precommitted"})
    with pytest.raises(Fenced, match="the lease is b:2's"):
        await a.write({"state": b"committed"})
    with pytest.raises(Fenced):
        await a.renew()
    assert (a.leads(), a.fence) == (False, 0)
    assert dict((await b.read()).fields) == {"state": b"precommitted"}


async def test_a_lease_that_ended_is_not_written_under_even_if_nobody_took_it(stores: Stores) -> None:
    a = await stores.leader("a")
    await stores.end_lease()
    with pytest.raises(Fenced, match="nobody's"):
        await a.write({"state": b"committed"})
    assert (await a.acquire()).fence == 2
    with pytest.raises(Conflict):
        await a.write({"state": b"committed"})  # it has to look first what holds now


async def test_fields_and_blobs_are_written_together_and_taken_away(stores: Stores) -> None:
    a = await stores.leader("a")
    await a.write({"x": b"1", "y": b"2"}, blobs={"plan:d": b"\x00\xff plan"})
    assert await a.blob("plan:d") == b"\x00\xff plan"
    await a.write({"x": b"3"}, removed=["y"], blobs={"plan:d": None})
    assert dict(await a.load()) == {"x": b"3"}
    assert await a.blob("plan:d") is None


async def test_a_follower_reads_what_holds(stores: Stores) -> None:
    a = await stores.leader("a")
    await a.write({"x": b"1"})
    snapshot = await stores.new("b").read()
    assert dict(snapshot.fields) == {"x": b"1"}
    assert snapshot.leader is not None
    assert snapshot.leader.endpoint == "tcp://a:5555"
    await a.release()
    assert (await stores.new("b").read()).leader is None


async def test_clusters_do_not_see_each_other(server: RedisServer, stores: Stores) -> None:
    await stores.leader("a")
    other = RedisStore(server.url, "another", "b", "tcp://b:5555", LEASE_SECONDS)
    assert (await other.acquire()).identity == "b"
    await other.release()
    await other.close()


async def test_a_write_without_an_answer_is_settled_before_the_next(server: RedisServer, stores: Stores) -> None:
    """Redis hangs: the write's outcome is open, and when Redis goes on it may still run it, after whatever came later."""
    a = stores.new("a", lease_seconds=1.5)
    await a.acquire()
    await a.load()
    # The lease is not to end while Redis hangs: that is another story.
    await stores.raw.persist(f"hotweights/{stores.cluster}/leader")
    server.freeze()
    with pytest.raises(BackendUnavailable, match="Redis at redis:"):
        await a.write({"state": b"committed"})
    with pytest.raises(Conflict, match="loaded before"):
        await a.write({"state": b"aborted"})
    server.thaw()
    held = dict(await a.load())  # either is right, but from here on it stays what was read
    await asyncio.sleep(0.05)
    assert dict((await a.read()).fields) == held
    await a.write({"state": b"next"})
    assert dict((await a.read()).fields) == {"state": b"next"}


async def test_a_late_write_is_void_once_the_state_was_loaded(stores: Stores) -> None:
    a = await stores.leader("a")
    late = a._revision
    await a.load()
    a._revision = late  # as Redis would see it: the same lease, the revision of before
    with pytest.raises(Conflict, match="written meanwhile"):
        await a.write({"state": b"committed"})
    assert dict(await a.load()) == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["ended", "killed"])
async def test_state_lease_and_fence_survive_a_restart_of_redis(tmp_path: Path, number: signal.Signals) -> None:
    server = RedisServer(tmp_path)
    server.start()
    a = RedisStore(server.url, "c", "a", "tcp://a:1", LEASE_SECONDS)
    b = RedisStore(server.url, "c", "b", "tcp://b:1", LEASE_SECONDS)
    try:
        for _ in range(3):
            await a.acquire()
            await a.release()
        await a.acquire()
        await a.load()
        await a.write({"state": b"committed"})
        server.stop(number)
        with pytest.raises(BackendUnavailable):
            await a.renew()
        with pytest.raises(BackendUnavailable):
            await a.write({"never": b"1"})
        server.start()
        await a.renew()  # its lease is still its own
        assert (await b.acquire()).identity == "a"
        assert dict(await a.load()) == {"state": b"committed"}
        await a.write({"more": b"1"})
        await a.release()
        assert (await b.acquire()).fence == 5
        assert dict(await b.load()) == {"state": b"committed", "more": b"1"}
    finally:
        await a.close()
        await b.close()
        server.stop()


async def test_a_redis_that_lost_everything_is_said_aloud_and_the_fence_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = RedisServer(tmp_path)
    server.start()
    a = RedisStore(server.url, "c", "a", "tcp://a:1", LEASE_SECONDS)
    b = RedisStore(server.url, "c", "b", "tcp://b:1", LEASE_SECONDS)
    try:
        for _ in range(3):
            await a.acquire()
            await a.release()
        await a.acquire()
        assert (await b.acquire()).fence == 4
        server.stop(signal.SIGKILL)
        server.forget()
        with pytest.raises(BackendUnavailable):
            await a.renew()
        with pytest.raises(BackendUnavailable):
            await b.acquire()
        server.start()
        with pytest.raises(Fenced):
            await a.renew()
        assert (await b.acquire()).fence == 5
        assert "has lost state: its last lease was number 0, this process knows number 4" in caplog.text
    finally:
        await a.close()
        await b.close()
        server.stop()


async def test_it_says_what_a_crash_of_redis_would_lose(server: RedisServer, stores: Stores) -> None:
    store = stores.new("a")
    assert await store.persistence() == ""
    await stores.raw.config_set("appendfsync", "everysec")
    assert "a crash loses the last commits" in await store.persistence()
    await stores.raw.config_set("appendfsync", "always")


async def test_a_redis_that_is_not_there_is_named_without_its_password() -> None:
    store = RedisStore("redis://:secret@127.0.0.1:1/0", "c", "a", "tcp://a:1", LEASE_SECONDS)
    with pytest.raises(BackendUnavailable, match=r"redis://127\.0\.0\.1:1/0") as caught:
        await store.acquire()
    assert "secret" not in str(caught.value)
    await store.close()
