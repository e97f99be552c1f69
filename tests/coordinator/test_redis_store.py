"""Leases and fenced writes, against a real redis-server."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import redis.asyncio

from hotweights_coordinator.backends.base import Fenced, Lease, Unavailable, lease_clock
from hotweights_coordinator.backends.redis_store import Conflict, RedisStore
from tests.coordinator.ha.redis_server import RedisServer

LEASE_SECONDS = 60.0  # nobody waits for its end here: what should end is ended by hand


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


class Member:
    """One coordinator's store, with its name and the lease it was told last."""

    def __init__(
        self, url: str, cluster: str, name: str, lease_seconds: float, clock: Callable[[], float]
    ) -> None:
        self.name, self._clock = name, clock
        self.store = RedisStore(url, cluster, lease_seconds, clock)
        self.lease = Lease(mine=False, fence=0, leader="", until=0.0)

    async def lead(self) -> Lease:
        self.lease = await self.store.lead(self.name, f"tcp://{self.name}:5555")
        return self.lease

    @property
    def leads(self) -> bool:
        return self.lease.mine and self._clock() < self.lease.until

    async def load(self) -> dict[str, bytes]:
        return (await self.store.load())[0]

    async def write(self, **fields: bytes) -> None:
        await self.store.write(fields, self.lease)

    async def release(self) -> None:
        await self.store.release(self.lease)


class Cluster:
    """Makes members, closes them, and looks past them into Redis."""

    def __init__(self, server: RedisServer, name: str) -> None:
        self.now, self.lease_key = 0.0, f"hotweights/{name}/leader"
        self._server, self._name = server, name
        self._made: list[Member] = []
        self.raw = redis.asyncio.Redis.from_url(server.url)

    def new(self, name: str) -> Member:
        self._made.append(
            Member(self._server.url, self._name, name, LEASE_SECONDS, lambda: self.now)
        )
        return self._made[-1]

    async def leader(self, name: str) -> Member:
        member = self.new(name)
        assert (await member.lead()).mine
        await member.load()
        return member

    async def end_lease(self) -> None:
        """As if its time had passed."""
        await self.raw.delete(self.lease_key)

    async def close(self) -> None:
        for member in self._made:
            await member.store.close()
        await self.raw.aclose()


@pytest.fixture
async def cluster(server: RedisServer, request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    cluster = Cluster(server, request.node.name)
    yield cluster
    await cluster.close()


@pytest.fixture
async def mortal(tmp_path: Path) -> AsyncIterator[tuple[RedisServer, Cluster]]:
    """A Redis that may be ended, and a cluster in it."""
    server = RedisServer(tmp_path)
    server.start()
    cluster = Cluster(server, "mortal")
    yield server, cluster
    await cluster.close()
    server.stop()


async def test_one_leads_and_the_others_learn_who(cluster: Cluster) -> None:
    a, b = cluster.new("a"), cluster.new("b")
    await a.lead()
    await b.lead()
    assert (a.lease.mine, a.lease.fence, a.lease.leader) == (True, 1, "tcp://a:5555")
    assert (b.lease.mine, b.lease.fence, b.lease.leader) == (False, 1, "tcp://a:5555")
    assert (a.leads, b.leads) == (True, False)


async def test_many_ask_at_once_and_one_gets_it(cluster: Cluster) -> None:
    members = [cluster.new(f"c{number}") for number in range(20)]
    leases = await asyncio.gather(*(one.lead() for one in members))
    assert sum(lease.mine for lease in leases) == 1
    assert len({(lease.leader, lease.fence) for lease in leases}) == 1


async def test_the_same_name_in_another_process_is_somebody_else(cluster: Cluster) -> None:
    first, second = cluster.new("a:5555"), cluster.new("a:5555")
    assert (await first.lead()).mine
    assert not (await second.lead()).mine


async def test_the_leader_stops_before_the_lease_ends(cluster: Cluster) -> None:
    a = await cluster.leader("a")
    cluster.now = LEASE_SECONDS * 0.89
    assert a.leads
    cluster.now = LEASE_SECONDS * 0.91
    assert not a.leads
    await a.lead()
    assert (a.leads, a.lease.fence) == (True, 1)


async def test_the_lease_counts_from_when_it_was_asked_for(
    server: RedisServer, cluster: Cluster
) -> None:
    a = await cluster.leader("a")
    server.freeze()
    renewal = asyncio.create_task(a.lead())
    await asyncio.sleep(0.05)
    cluster.now = LEASE_SECONDS  # the answer takes as long as the lease
    server.thaw()
    assert (await renewal).mine
    assert not a.leads


async def test_a_leader_looks_thrice_a_lease_and_the_others_more_often(cluster: Cluster) -> None:
    a, b = await cluster.leader("a"), cluster.new("b")
    await b.lead()
    assert (a.store.renew_seconds, b.store.renew_seconds) == (LEASE_SECONDS / 3, LEASE_SECONDS / 10)


async def test_a_lease_given_back_is_free_at_once(cluster: Cluster) -> None:
    a, b = await cluster.leader("a"), cluster.new("b")
    await a.release()
    assert (await b.lead()).mine
    assert b.lease.fence == 2


async def test_nobody_gives_back_anothers_lease(cluster: Cluster) -> None:
    a = await cluster.leader("a")
    await cluster.end_lease()
    b = await cluster.leader("b")
    await a.release()
    assert (await b.lead()).fence == b.lease.fence == 2


async def test_a_lease_whose_grant_got_lost_is_found_again(cluster: Cluster) -> None:
    a = await cluster.leader("a")
    value = await cluster.raw.get(cluster.lease_key)
    a.store._value = ""  # as before the answer came
    await cluster.raw.pexpire(cluster.lease_key, 40_000)
    before = await cluster.raw.pttl(cluster.lease_key)
    assert ((await a.lead()).mine, a.lease.fence, a.store._value.encode()) == (True, 1, value)
    after = await cluster.raw.pttl(cluster.lease_key)
    # it is as long as Redis says, less the margin, and not as a new one
    assert after <= (a.lease.until + 0.1 * LEASE_SECONDS) * 1000 <= before < 1000 * LEASE_SECONDS


async def test_a_leader_that_slept_can_neither_renew_nor_write(cluster: Cluster) -> None:
    a = await cluster.leader("a")
    await a.write(state=b"begun")
    await cluster.end_lease()
    b = await cluster.leader("b")
    await b.write(state=b"precommitted")
    with pytest.raises(Fenced, match=r"the lease is b/.*:2's"):
        await a.write(state=b"committed")
    with pytest.raises(Fenced):
        await a.store.put("plan", b"x")
    assert not (await a.lead()).mine
    with pytest.raises(Fenced):
        await a.store.put("plan", b"x")
    assert await a.load() == {"state": b"precommitted"}


async def test_a_lease_that_ended_is_not_written_under_even_if_nobody_took_it(
    cluster: Cluster,
) -> None:
    a = await cluster.leader("a")
    old = a.lease
    await cluster.end_lease()
    with pytest.raises(Fenced, match="nobody's"):
        await a.write(state=b"committed")
    assert (await a.lead()).fence == 2
    with pytest.raises(Fenced, match="lease 1 is no longer"):
        await a.store.write({"state": b"committed"}, old)
    with pytest.raises(Conflict):
        await a.write(state=b"committed")  # it has to look first what holds now


async def test_fields_stay_until_they_are_written_again(cluster: Cluster) -> None:
    a = await cluster.leader("a")
    await a.write(x=b"1", y=b"2")
    await a.write(x=b"3")
    assert await a.load() == await cluster.new("b").load() == {"x": b"3", "y": b"2"}


async def test_blobs_are_kept_until_they_are_dropped(cluster: Cluster) -> None:
    a, b = await cluster.leader("a"), cluster.new("b")
    await a.store.put("plan", b"\x00\xff plan")
    assert await b.store.get("plan") == b"\x00\xff plan"
    assert await b.store.get("another") is None
    assert (await a.store.load())[1] == {"plan"}
    await a.store.drop(["plan", "another"], a.lease)
    assert await b.store.get("plan") is None


async def test_clusters_do_not_see_each_other(server: RedisServer, cluster: Cluster) -> None:
    await cluster.leader("a")
    other = Cluster(server, "another")
    assert (await other.new("b").lead()).mine
    await other.close()


async def test_a_write_without_an_answer_is_settled_before_the_next(
    server: RedisServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis hangs: the write's outcome is open, and when Redis goes on it may still run it, after
    whatever came later.
    """
    a = await cluster.leader("a")
    server.freeze()
    monkeypatch.setattr(a.store, "_lease_seconds", 0.5)  # an answer later than the lease is none
    with pytest.raises(Unavailable, match="Redis at redis:"):
        await a.write(state=b"committed")
    monkeypatch.undo()
    with pytest.raises(Conflict, match="loaded first"):
        await a.write(state=b"aborted")
    server.thaw()
    held = await a.load()  # either is right, but from here on it stays what was read
    await asyncio.sleep(0.05)
    assert await a.load() == held
    await a.write(state=b"next")
    assert await a.load() == {"state": b"next"}


async def test_late_changes_are_void_once_the_state_was_loaded(cluster: Cluster) -> None:
    a = await cluster.leader("a")
    await a.store.put("plan", b"x")
    late = a.store._revision
    await a.load()
    a.store._revision = late  # as Redis sees it: the same lease, the revision of before
    with pytest.raises(Conflict, match="written meanwhile"):
        await a.store.drop(["plan"], a.lease)
    with pytest.raises(Conflict, match="written meanwhile"):
        await a.write(state=b"committed")
    assert await a.load() == {}
    assert await a.store.get("plan") == b"x"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["ended", "killed"])
async def test_state_lease_and_fence_survive_a_restart_of_redis(
    mortal: tuple[RedisServer, Cluster], number: signal.Signals
) -> None:
    server, cluster = mortal
    a, b = await cluster.leader("a"), cluster.new("b")
    await a.write(state=b"committed")
    server.stop(number)
    with pytest.raises(Unavailable):
        await a.lead()
    with pytest.raises(Unavailable):
        await a.write(never=b"1")
    server.start()
    assert (await a.lead()).fence == 1  # its lease is still its own
    assert not (await b.lead()).mine
    assert await a.load() == {"state": b"committed"}
    await a.write(more=b"1")
    await a.release()
    assert (await b.lead()).fence == 2
    assert await b.load() == {"state": b"committed", "more": b"1"}


async def test_a_redis_that_lost_everything_is_said_aloud_and_the_fence_goes_on(
    mortal: tuple[RedisServer, Cluster], caplog: pytest.LogCaptureFixture
) -> None:
    server, cluster = mortal
    for _ in range(3):
        a = await cluster.leader("a")
        await a.release()
    a, b = await cluster.leader("a"), cluster.new("b")
    assert (await b.lead()).fence == 4
    server.stop(signal.SIGKILL)
    server.forget()
    for one in (a, b):
        with pytest.raises(Unavailable):
            await one.lead()
    server.start()
    assert ((await b.lead()).mine, b.lease.fence) == (True, 5)
    assert not (await a.lead()).mine
    assert "HAS LOST STATE: its last lease was number 0, this process knows 4" in caplog.text


async def test_it_says_what_a_crash_of_redis_would_lose(cluster: Cluster) -> None:
    store = cluster.new("a").store
    assert await store.persistence() == ""
    await cluster.raw.config_set("appendfsync", "everysec")
    assert "a crash loses the last commits" in await store.persistence()
    await cluster.raw.config_set("appendfsync", "always")


async def test_a_redis_that_is_not_there_is_named_without_its_password() -> None:
    store = RedisStore("redis://:secret@127.0.0.1:1/0", "c", LEASE_SECONDS)
    with pytest.raises(Unavailable, match=r"redis://127\.0\.0\.1:1/0") as caught:
        await store.lead("a", "tcp://a:1")
    assert "secret" not in str(caught.value)
    await store.close()


async def test_whoever_is_cancelled_ends(cluster: Cluster) -> None:
    """At any moment of a call: a shutdown waits for it. Sockets with time limits of the library's
    own fail this on Python 3.11.
    """
    a = await cluster.leader("a")

    async def lead() -> None:
        await a.lead()
        await asyncio.sleep(10)

    for turns in [*range(1, 9)] * 5:
        task = asyncio.create_task(lead())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=50)
        assert task.cancelled()


def test_a_lease_ends_while_the_machine_is_suspended(monkeypatch: pytest.MonkeyPatch) -> None:
    """`time.monotonic` stands still there; the clock of a lease does not."""
    boottime, awake = [100.0], time.monotonic()
    monkeypatch.setattr(time, "clock_gettime", lambda clock: boottime[0])
    monkeypatch.setattr(time, "monotonic", lambda: awake)
    lease = Lease(mine=True, fence=1, leader="", until=lease_clock() + 5.0)
    assert lease.is_held
    boottime[0] += 6.0
    assert not lease.is_held
