"""One version comes from whoever has it: parents, their stand-ins, the origin; however they
fail.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hotweights_agent.staging import fetch as fetching
from hotweights_agent.staging.chunk_sources import ChunkSource, PeerSource
from hotweights_agent.staging.fetch import Fetch, FetchFailed, Progress
from hotweights_agent.staging.fetch_policy import FetchPolicy
from hotweights_agent.staging.store import Store
from hotweights_common.backoff import Backoff
from hotweights_storage.errors import Cancelled, NoCapacity
from hotweights_storage.image import ImageBuilder
from hotweights_transports.peers import frames
from hotweights_transports.peers.base import (
    Deliver,
    Missing,
    PeerClient,
    PeerCorrupt,
    PeerServer,
    PeerTimeout,
    Want,
)
from hotweights_transports.peers.rate_limiter import RateLimiter
from hotweights_transports.peers.stream import address as addresses

Checkpoint = Any  # conftest's; a conftest is no module to import from
Table = Any
Serve = Callable[[Store], PeerServer]
Connect = Callable[[str], PeerClient]

QUICK = FetchPolicy(
    deadline_seconds=30, backoff=Backoff(0.01, 60.0), patience_seconds=0.0, again_seconds=0.02
)


class Clock:
    """The fetch's: it goes on as a source gives chunks, whatever the machine does meanwhile."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def tick(self, _want: Want) -> None:
        self.now += 1.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(fetching, "time", found)
    return found


class Slow:
    """Gives a few chunks and then none, until it is called off."""

    def __init__(
        self,
        data: dict[str, bytes],
        *,
        before: Callable[[Want], None] = lambda want: None,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = "slow"
        self._data, self._before, self._then = data, before, then
        self.gave = self.calls = 0

    def fetch(
        self, wanted: Iterator[Want], deliver: Deliver, stop: threading.Event
    ) -> list[Missing]:
        self.calls += 1
        for want in wanted:
            if self.gave == 5:
                self._then()
                assert stop.wait(50), "nobody called it off"
                break
            self._before(want)
            deliver(want, memoryview(self._data[want.blake3]))
            self.gave += 1
        return []


@pytest.fixture
def version(checkpoint: Callable[..., Checkpoint]) -> Checkpoint:
    return checkpoint("v1", tuple(range(25)))


def fetch(
    store: Store,
    version: Checkpoint,
    *sources: ChunkSource,
    policy: FetchPolicy = QUICK,
    **more: Any,
) -> Progress:
    with store.begin(version.manifest) as staging:
        found = Fetch(staging.builder, sources, policy=policy, **more).run()
        staging.commit()
    return found


def test_from_one_source_in_load_order(store: Store, version: Checkpoint, table: Table) -> None:
    source = table(version.data)
    found = fetch(store, version, source)
    assert source.pending == list(version.data)
    assert found == Progress(version.nbytes, version.nbytes, (("table", version.nbytes),))


def test_a_dead_source_is_passed_over(
    store: Store, version: Checkpoint, table: Table, dead: Any
) -> None:
    first, second = dead(), table(version.data)
    assert fetch(store, version, first, second).by_source == (
        ("dead", 0),
        ("table", version.nbytes),
    )
    assert first.calls == 1


def test_what_one_lacks_another_has(store: Store, version: Checkpoint, table: Table) -> None:
    half = {blake3: version.data[blake3] for blake3 in list(version.data)[::2]}
    first, second = table(half, "donor"), table(version.data, "origin")
    assert dict(fetch(store, version, first, second).by_source) == {
        "donor": len(half) * 4096,
        "origin": (len(version.data) - len(half)) * 4096,
    }
    assert second.pending == list(version.data)[1::2]


def test_a_source_that_dies_in_the_middle(store: Store, version: Checkpoint, table: Table) -> None:
    def die(_want: Want) -> None:
        if len(first.pending) == 30:
            raise PeerTimeout("tcp://a:1", "not a byte for 10 s")

    first, second = table(version.data, "first", die), table(version.data, "second")
    found = dict(fetch(store, version, first, second).by_source)
    assert found == {"first": 29 * 4096, "second": (len(version.data) - 29) * 4096}
    assert second.pending == list(version.data)[29:]


def test_a_liar_is_asked_once(store: Store, version: Checkpoint, table: Table) -> None:
    wrong = {**version.data, list(version.data)[3]: bytes(4096)}
    first, second = table(wrong, "liar"), table(version.data, "honest")
    found = dict(fetch(store, version, first, second).by_source)
    assert found == {"liar": 3 * 4096, "honest": (len(version.data) - 3) * 4096}
    assert first.calls == 1


def test_wrong_everywhere_names_the_chunk(store: Store, version: Checkpoint, table: Table) -> None:
    wrong = {**version.data, list(version.data)[3]: bytes(4096)}
    with pytest.raises(
        FetchFailed,
        match=r"model.safetensors: chunk 3 of tensor "
        r"model\.layers\.0\.weight",
    ) as caught:
        fetch(store, version, table(wrong, "a"), table(wrong, "b"))
    assert caught.value.reason == "ChecksumMismatch"
    assert not caught.value.transient
    assert store.versions() == ()


def test_nobody_has_it(store: Store, version: Checkpoint, table: Table, dead: Any) -> None:
    gone = dead()
    with pytest.raises(FetchFailed, match="from none of 2 sources; the disk is gone") as caught:
        fetch(store, version, table({}), gone)
    assert caught.value.reason == "SourceNotFound"
    assert caught.value.transient
    assert gone.calls == QUICK.rounds


def test_a_parent_that_does_not_know_the_version_yet_is_waited_for(
    store: Store, version: Checkpoint, table: Table
) -> None:
    data: dict[str, bytes] = {}

    def learn(_want: Want) -> None:
        if parent.calls == 5:
            data.update(version.data)

    parent, origin = table(data, "parent", learn, version_known=False), table(version.data)
    policy = FetchPolicy(deadline_seconds=50, patience_seconds=50, again_seconds=0.02)
    found = fetch(store, version, parent, origin, policy=policy)
    assert dict(found.by_source) == {"parent": version.nbytes, "table": 0}


def test_patience_ends(store: Store, version: Checkpoint, table: Table, clock: Clock) -> None:
    parent, origin = (
        table({}, "parent", clock.tick, version_known=False),
        table(version.data, "origin"),
    )
    rounds = 3.0
    policy = FetchPolicy(patience_seconds=rounds * len(version.data), again_seconds=0.02)
    assert (
        dict(fetch(store, version, parent, origin, policy=policy).by_source)["origin"]
        == version.nbytes
    )
    assert parent.calls == rounds


def test_cancel(store: Store, version: Checkpoint) -> None:
    cancel = threading.Event()
    source = Slow(version.data, then=cancel.set)
    with pytest.raises(Cancelled):
        fetch(store, version, source, cancel=cancel)
    assert source.calls == 1


def test_the_deadline(store: Store, version: Checkpoint) -> None:
    source = Slow(version.data)
    with pytest.raises(
        FetchFailed,
        match=r"bytes came within 0\.2 s; raise "
        r"staging.timeoutSeconds",
    ) as caught:
        fetch(store, version, source, policy=FetchPolicy(deadline_seconds=0.2))
    assert caught.value.reason == "StageTimeout"


def test_a_parent_that_is_too_slow_for_the_deadline_is_replaced(
    store: Store, version: Checkpoint, table: Table, clock: Clock
) -> None:
    """It would take twice as long as there is."""
    slow, quick = Slow(version.data, before=clock.tick), table(version.data, "quick")
    policy = FetchPolicy(deadline_seconds=len(version.data) / 2, rate_seconds=2.0)
    found = dict(fetch(store, version, slow, quick, policy=policy).by_source)
    assert found["quick"] > version.nbytes / 2
    assert found["slow"] > 0


def test_one_that_is_in_time_is_kept(
    store: Store, version: Checkpoint, table: Table, clock: Clock
) -> None:
    def slowly(want: Want) -> None:
        clock.tick(want)
        time.sleep(0.004)  # it is looked at now and then

    slow, quick = table(version.data, "slow", slowly), table(version.data, "quick")
    policy = FetchPolicy(deadline_seconds=4.0 * len(version.data), rate_seconds=5.0)
    found = dict(fetch(store, version, slow, quick, policy=policy).by_source)
    assert found == {"slow": version.nbytes, "quick": 0}


def test_the_last_one_is_kept_until_the_deadline(store: Store, version: Checkpoint) -> None:
    last = Slow(version.data)
    with pytest.raises(FetchFailed, match="bytes came within"):
        fetch(store, version, last, policy=FetchPolicy(deadline_seconds=0.5, rate_seconds=0.1))
    assert last.calls == 1


def helped(rate_seconds: float = 0.1) -> FetchPolicy:
    return FetchPolicy(
        deadline_seconds=3600.0,
        rate_seconds=rate_seconds,
        patience_seconds=0.0,
        backoff=Backoff(0.01, 60.0),
    )


def until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until it is so, but not longer."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_one_that_is_slow_and_yet_in_time_is_helped_by_a_far_quicker_one(
    store: Store, version: Checkpoint, table: Table, clock: Clock
) -> None:
    """Alone it would take a small part of the time that there is."""

    def slowly(want: Want) -> None:
        clock.tick(want)
        # it is helped a little first, and then a lot
        until(lambda: len(quick.pending) > len(version.data) / 2, 0.3)

    slow = table(version.data, "slow", slowly)
    quick, origin = table(version.data, "quick"), table(version.data, "origin")
    policy = helped(rate_seconds=1.0)
    found = dict(fetch(store, version, slow, quick, origin, policy=policy).by_source)
    assert found["quick"] > version.nbytes / 2
    assert found["slow"] > 0
    assert origin.calls == 0, "it would be asked by everybody at once"
    assert quick.pending[0] != next(iter(version.data)), "from the end"


def test_one_that_is_no_quicker_is_tried_and_let_alone(
    store: Store, version: Checkpoint, table: Table, clock: Clock
) -> None:
    """As in a chain that runs as quickly as the network lets it."""

    def slowly(want: Want) -> None:
        clock.tick(want)
        if len(slow.pending) > 15:
            until(lambda: helper.calls > 0, 0.3)
        if len(slow.pending) == 60:
            until(lambda: len(helper.pending) > 1, 50)  # it has brought something
        time.sleep(0.01)

    def as_slowly(_want: Want) -> None:
        before = len(slow.pending)
        until(
            lambda: (
                len(slow.pending) > before
                or len(slow.pending) + len(helper.pending) > len(version.data)  # all was asked for
            ),
            50,
        )

    slow, helper = table(version.data, "a", slowly), table(version.data, "b", as_slowly)
    origin = table(version.data, "origin")
    found = dict(
        fetch(store, version, slow, helper, origin, policy=helped(rate_seconds=10.0)).by_source
    )
    assert 0 < found["b"] <= version.nbytes / 8
    assert helper.calls == 1


@pytest.mark.parametrize("fault", ["lacks all", "is dead", "hangs"])
def test_a_helper_that_does_not_help_costs_nothing(
    store: Store, version: Checkpoint, table: Table, dead: Callable[[], ChunkSource], fault: str
) -> None:
    release = threading.Event()

    def slowly(_want: Want) -> None:
        if len(slow.pending) > 20:
            until(lambda: helper.calls > 0, 0.3)
        time.sleep(0.01)

    slow = table(version.data, "slow", slowly)
    helper = {
        "lacks all": table({}, "helper"),
        "is dead": dead(),
        "hangs": table(version.data, "helper", before=lambda want: release.wait(50)),
    }[fault]
    origin = table(version.data, "origin")

    with store.begin(version.manifest) as staging:
        wanted = Fetch(staging.builder, [slow, helper, origin], policy=helped())
        watching = threading.Thread(target=_when_whole, args=(staging.builder, release))
        watching.start()
        found = dict(wanted.run().by_source)
        watching.join()
        staging.commit()
    assert found == {"slow": version.nbytes, helper.name: 0, "origin": 0}
    assert helper.calls == 1


def _when_whole(builder: ImageBuilder, release: threading.Event) -> None:
    until(lambda: not builder.missing_count, 50)
    release.set()


def test_all_fetches_of_a_node_share_its_limit(
    store: Store, checkpoint: Callable[..., Checkpoint], table: Table
) -> None:
    """Two versions of 96 pages at once, and 192 pages take a second."""
    versions = [checkpoint("v1", tuple(range(24))), checkpoint("v2", tuple(range(30, 54)))]
    throttle = RateLimiter(2 * versions[0].nbytes)
    policy = FetchPolicy(deadline_seconds=50)
    threads = [
        threading.Thread(
            target=fetch,
            args=(store, version, table(version.data)),
            kwargs={"policy": policy, "throttle": throttle},
        )
        for version in versions
    ]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [version.phase for version in store.versions()] == ["Staged", "Staged"]
    assert time.monotonic() - began > 0.8


def test_progress_is_told(store: Store, version: Checkpoint, table: Table) -> None:
    done: list[int] = []

    def in_the_middle(_want: Want) -> None:
        if len(source.pending) == 50:
            until(lambda: bool(done) and done[-1] > 0, 50)

    source = table(version.data, before=in_the_middle)
    fetch(
        store,
        version,
        source,
        progress=lambda progress: done.append(progress.done_nbytes),
        policy=FetchPolicy(progress_seconds=0.0),
    )
    assert done == sorted(done)
    assert done[-1] == version.nbytes
    assert any(0 < nbytes < version.nbytes for nbytes in done)


def test_no_room_ends_it_at_once(store: Store, version: Checkpoint, table: Table) -> None:
    def full(_want: Want) -> None:
        raise NoCapacity("no memory for chunk")

    other = table(version.data)
    with pytest.raises(NoCapacity):
        fetch(store, version, table(version.data, before=full), other)
    assert other.calls == 0


def test_a_version_that_is_here_in_parts_fetches_the_rest(
    store: Store, checkpoint: Callable[..., Checkpoint], table: Table
) -> None:
    old, new = checkpoint("v0", (1, 2, 3)), checkpoint("v1", (1, 20, 3))
    fetch(store, old, table(old.data))
    source = table(new.data)
    found = fetch(store, new, source)
    assert found.needed_nbytes == new.nbytes // 3
    assert source.pending == list(new.data)[4:8]
    assert fetch(store, checkpoint("v2", (3, 1)), table({})).needed_nbytes == 0


def test_nodes_in_a_chain_over_tcp(
    version: Checkpoint, table: Table, serve: Serve, connect: Connect
) -> None:
    """Four nodes: each child asks before its parent has anything, and has its first chunk before
    the head has its last.
    """
    stores = [Store(available=lambda: 1 << 30) for _ in range(4)]
    first: dict[int, float] = {}
    last: dict[int, float] = {}

    def head(_want: Want) -> None:
        if len(source.pending) == len(version.data):
            until(lambda: 3 in first, 40)
        time.sleep(0.004)

    source = table(version.data, before=head)

    def run(number: int) -> None:
        with stores[number].begin(version.manifest) as staging:
            parent: ChunkSource = source
            if number:
                parent = PeerSource(connect(servers[number - 1].address), version.manifest.digest)

            def told(progress: Progress) -> None:
                if progress.done_nbytes:
                    first.setdefault(number, time.monotonic())

            policy = FetchPolicy(
                deadline_seconds=50,
                patience_seconds=50,
                progress_seconds=0.0,
                again_seconds=0.02,
            )
            Fetch(staging.builder, [parent], policy=policy, progress=told).run()
            staging.commit()
            last[number] = time.monotonic()

    servers = [serve(store) for store in stores]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(run, reversed(range(4))))
    assert all(store.versions()[0].phase == "Staged" for store in stores)
    assert first[3] < last[0]
    for store in stores:
        store.release(version.manifest.digest)


def test_a_parent_that_dies_in_a_chain_is_replaced(
    version: Checkpoint, store: Store, table: Table, serve: Serve, connect: Connect
) -> None:
    parent, donor = Store(available=lambda: 1 << 30), Store(available=lambda: 1 << 30)
    for holder in (parent, donor):
        fetch(holder, version, table(version.data))
    dying, living = serve(parent), serve(donor)
    closer = threading.Thread(target=dying.close)

    def told(progress: Progress) -> None:
        if progress.done_nbytes and not closer.ident:
            closer.start()

    digest = version.manifest.digest
    sources = [PeerSource(connect(server.address), digest) for server in (dying, living)]
    policy = FetchPolicy(deadline_seconds=30, progress_seconds=0.0)
    found = fetch(store, version, *sources, progress=told, policy=policy)
    closer.join()
    assert found.done_nbytes == version.nbytes
    for holder in (parent, donor):
        holder.release(digest)


def test_bytes_that_changed_in_a_parents_memory_are_fetched_elsewhere(
    version: Checkpoint,
    store: Store,
    table: Table,
    serve: Serve,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parent = Store(available=lambda: 1 << 30)
    fetch(parent, version, table(version.data))
    wrong, other = random.Random(1).sample(list(version.data), 2)
    locate = parent.locate
    monkeypatch.setattr(
        parent, "locate", lambda blake3: locate(other if blake3 == wrong else blake3)
    )
    client = connect(serve(parent).address)
    with store.begin(version.manifest) as staging:

        def put(want: Want, data: memoryview) -> None:
            staging.builder.put(want.blake3, data)

        with pytest.raises(PeerCorrupt):
            client.fetch_chunks(version.manifest.digest, [Want(wrong, 4096)], put)
    origin = table(version.data, "origin")
    found = dict(
        fetch(store, version, PeerSource(client, version.manifest.digest), origin).by_source
    )
    assert found["origin"] > 0
    assert sum(found.values()) == version.nbytes
    parent.release(version.manifest.digest)


def test_a_child_that_is_slow_to_read_does_not_keep_its_parent_from_sealing(
    store: Store, checkpoint: Callable[..., Checkpoint], serve: Serve
) -> None:
    """Pages that wait in a socket by `sendfile` would be pinned, and sealing refused with EBUSY."""
    # More than the kernel takes into a socket that nobody reads, or the parent is through before
    # anybody looks.
    buffer_nbytes = int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2])
    version = checkpoint(
        "v1", tuple(range((buffer_nbytes + 2**20) // checkpoint("one", (0,)).nbytes))
    )
    host, port = addresses.parse(serve(store).address)
    with store.begin(version.manifest) as staging, socket.socket() as sock:
        for blake3 in staging.builder.missing:
            staging.builder.put(blake3, version.data[blake3])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((host, port))
        sock.sendall(frames.hello("agent"))
        wanted = list(version.data)
        for at in range(0, len(wanted), frames.MAX_REQUESTED_CHUNKS):
            some = wanted[at : at + frames.MAX_REQUESTED_CHUNKS]
            sock.sendall(frames.chunks_request(version.manifest.digest, some))
        while not store.versions()[0].pins:
            time.sleep(0.005)
        time.sleep(0.1)  # the socket's buffers are full now
        staging.commit()
    assert store.versions()[0].phase == "Staged"
