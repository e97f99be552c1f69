"""What a node holds, promises, lends and frees."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hotweights_agent.staging.store import Store, UnknownVersion, room
from hotweights_planner.manifest import PAGE_NBYTES as PAGE
from hotweights_storage import linux
from hotweights_storage.errors import (
    Cancelled,
    Incomplete,
    NoCapacity,
    SourceUnavailable,
    TransferError,
)
from hotweights_storage.slab import Slab
from hotweights_transports.peers.base import Lease, Pending

Checkpoint = Any  # conftest's; a conftest is no module to import from
NewCheckpoint = Callable[..., Checkpoint]


@pytest.fixture
def old(checkpoint: NewCheckpoint) -> Checkpoint:
    return checkpoint("v0", (1, 2, 3, 4))


@pytest.fixture
def new(checkpoint: NewCheckpoint) -> Checkpoint:
    """Half of it is as in `old`."""
    return checkpoint("v1", (1, 2, 30, 40))


def stage(store: Store, version: Checkpoint) -> None:
    with store.begin(version.manifest) as staging:
        for blake3 in staging.builder.missing:
            staging.builder.put(blake3, version.data[blake3])
        staging.commit()


def read(store: Store, blake3: str) -> bytes:
    lease = store.locate(blake3)
    assert isinstance(lease, Lease)
    try:
        return os.pread(lease.fd, lease.nbytes, lease.offset)
    finally:
        lease.release()


def test_a_version_is_staged_when_it_is_whole(store: Store, old: Checkpoint) -> None:
    digest = old.manifest.digest
    assert store.manifest(digest) is None
    with store.begin(old.manifest) as staging:
        assert store.manifest(digest) == old.manifest.canonical
        assert [version.phase for version in store.versions()] == ["Fetching"]
        with pytest.raises(Incomplete):
            staging.commit()
        with pytest.raises(UnknownVersion, match="not staged"):
            store.image(digest)
        for blake3 in staging.builder.missing:
            staging.builder.put(blake3, old.data[blake3])
        staging.commit()
    assert [(version.digest, version.phase) for version in store.versions()] == [(digest, "Staged")]
    with store.image(digest) as image:
        assert image.manifest == old.manifest
    assert all(read(store, blake3) == data for blake3, data in old.data.items())


def test_what_is_here_is_not_fetched_and_takes_no_memory(
    store: Store, old: Checkpoint, new: Checkpoint
) -> None:
    stage(store, old)
    before = store.usage()
    with store.begin(new.manifest) as staging:
        assert set(staging.builder.missing) == set(new.data) - set(old.data)
        assert staging.needed_nbytes == staging.builder.new_nbytes == new.nbytes // 2
        assert store.usage().promised == new.nbytes // 2
        for blake3 in staging.builder.missing:
            staging.builder.put(blake3, new.data[blake3])
        staging.commit()
    assert store.usage().held == before.held + new.nbytes // 2
    assert store.release(old.manifest.digest)
    assert all(read(store, blake3) == data for blake3, data in new.data.items())


def bring(staging: Any, version: Checkpoint, count: int | None = None) -> None:
    for blake3 in staging.builder.missing[:count]:
        staging.builder.put(blake3, version.data[blake3])


def fail(store: Store, version: Checkpoint, count: int, error: TransferError) -> None:
    with store.begin(version.manifest) as staging:
        bring(staging, version, count)
        raise error


def test_a_staging_that_is_left_is_out_of_the_table(store: Store, old: Checkpoint) -> None:
    with store.begin(old.manifest) as staging:
        bring(staging, old, 1)
        assert store.usage().held > 0
    assert store.versions() == ()
    assert store.manifest(old.manifest.digest) is None
    assert store.locate(next(iter(old.data))) is None
    assert store.usage().promised == 0
    stage(store, old)


def test_one_that_brought_nothing_leaves_nothing(store: Store, old: Checkpoint) -> None:
    with store.begin(old.manifest):
        pass
    assert store.settle()
    assert store.usage().held == 0


@pytest.mark.parametrize("error", [SourceUnavailable("gone"), Cancelled("called off")])
def test_the_next_try_goes_on_where_the_last_one_failed(
    store: Store, old: Checkpoint, error: TransferError
) -> None:
    """After three failures, a deadline and a cancellation alike."""
    with pytest.raises(type(error)):
        fail(store, old, 10, error)
    with store.begin(old.manifest) as staging:
        assert len(staging.builder.missing) == len(old.data) - 10
        assert staging.needed_nbytes == old.nbytes - 10 * PAGE
        bring(staging, old)
        staging.commit()
    assert store.usage().held == old.nbytes
    assert all(read(store, blake3) == data for blake3, data in old.data.items())


def test_a_version_takes_over_what_a_superseded_one_had(
    store: Store, old: Checkpoint, new: Checkpoint
) -> None:
    with store.begin(old.manifest) as staging:
        bring(staging, old)
    with store.begin(new.manifest) as staging:
        assert set(staging.builder.missing) == set(new.data) - set(old.data)
        bring(staging, new)
        staging.commit()
    assert all(read(store, blake3) == data for blake3, data in new.data.items())
    # a slab that is sealed now takes nothing more of the superseded one: it begins anew
    stage(store, old)
    assert all(read(store, blake3) == data for blake3, data in old.data.items())


def test_what_lies_aside_goes_when_its_memory_is_needed(checkpoint: NewCheckpoint) -> None:
    """And it is shown as free: it is in nobody's way."""
    first, second = checkpoint("v0", (1, 2, 3, 4)), checkpoint("v1", (5, 6, 7, 8))
    store = Store(available=lambda: first.nbytes - taken(store))
    with store.begin(first.manifest) as staging:
        bring(staging, first, 9)
    assert store.usage().held == 9 * PAGE
    assert store.usage().free == first.nbytes
    stage(store, second)
    assert store.usage().held == second.nbytes


def test_a_version_that_memory_failed_gives_it_back(store: Store, old: Checkpoint) -> None:
    with pytest.raises(NoCapacity):
        fail(store, old, 3, NoCapacity("the kernel had no page"))
    assert store.settle()
    assert store.usage().held == 0


def test_pages_are_freed_elsewhere_and_waited_for_where_they_are_needed(
    old: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release returns at once, and the next version finds the memory all the same."""
    store = Store(available=lambda: old.nbytes - kernel[0])
    kernel, gate, threads = [0], threading.Event(), list[str]()
    stage(store, old)
    kernel[0] = old.nbytes
    close = Slab.release

    def slowly(slab: Slab) -> None:
        threads.append(threading.current_thread().name)
        assert gate.wait(50.0)
        close(slab)
        kernel[0] = 0

    monkeypatch.setattr(Slab, "release", slowly)
    assert store.release(old.manifest.digest)
    assert not store.settle(0.0)
    threading.Timer(0.05, gate.set).start()
    with store.begin(old.manifest):
        assert kernel == [0]
    assert threads
    assert all(name.startswith("freeing") for name in threads)
    assert store.settle()


def test_too_few_descriptors_are_said_to_be_that(
    store: Store, old: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> tuple[int, int]:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(linux, "anonymous_memory", refuse)
    with pytest.raises(NoCapacity, match=r"v0 needs more open files.*RLIMIT_NOFILE"):
        store.begin(old.manifest)
    assert store.versions() == ()


def test_the_same_version_twice_is_refused(store: Store, old: Checkpoint) -> None:
    with store.begin(old.manifest), pytest.raises(TransferError, match="on its way") as caught:
        store.begin(old.manifest)
    assert caught.value.reason == "AlreadyStaged"


def test_too_little_memory_is_refused_before_the_first_byte(
    old: Checkpoint, new: Checkpoint
) -> None:
    store = Store(available=lambda: old.nbytes + 5000, reserve_nbytes=5000)
    with store.begin(old.manifest):
        with pytest.raises(
            NoCapacity, match=rf"v1 needs {new.nbytes} bytes of memory, 0 are free.*raise the agent"
        ) as caught:
            store.begin(new.manifest)
        assert caught.value.reason == "InsufficientMemory"
    with store.begin(new.manifest):
        pass


def test_a_chunk_on_its_way_can_be_waited_for(store: Store, old: Checkpoint) -> None:
    with store.begin(old.manifest) as staging:
        first, second, *_ = staging.builder.missing
        pending = store.locate(first)
        assert isinstance(pending, Pending)
        assert not pending.wait(0.01)
        threading.Timer(0.05, staging.builder.put, [first, old.data[first]]).start()
        assert pending.wait(50.0)
        assert read(store, first) == old.data[first]
        never = store.locate(second)
        assert isinstance(never, Pending)
    assert never.wait(0.0)
    assert store.locate(second) is None


def test_a_lease_outlives_the_version(store: Store, old: Checkpoint) -> None:
    stage(store, old)
    blake3, data = next(iter(old.data.items()))
    lease = store.locate(blake3)
    assert isinstance(lease, Lease)
    assert store.release(old.manifest.digest)
    assert store.locate(blake3) is None
    assert os.pread(lease.fd, lease.nbytes, lease.offset) == data
    lease.release()
    assert store.settle()
    with pytest.raises(OSError):
        os.pread(lease.fd, lease.nbytes, lease.offset)


def test_a_pin_outlives_the_version(store: Store, old: Checkpoint) -> None:
    stage(store, old)
    pin = store.image(old.manifest.digest)
    store.release(old.manifest.digest)
    assert os.fstat(pin.image.fds[0]).st_size > 0
    pin.release()
    pin.release()
    assert store.settle()
    with pytest.raises(OSError):
        os.fstat(pin.image.fds[0])


def test_release_of_what_is_not_staged(store: Store, old: Checkpoint) -> None:
    assert not store.release(old.manifest.digest)
    with store.begin(old.manifest):
        assert not store.release(old.manifest.digest)


def test_room() -> None:
    assert room(100, 30, 20) == 50
    assert room(100, 90, 20) == 0


SEEDS = [
    tuple(range(10)),
    tuple(range(5, 15)),
    tuple(range(20, 30)),
    tuple(range(8)) * 2,
    tuple(range(100, 120)),
]


def taken(store: Store) -> int:
    """What the kernel says is taken: pages of the slabs, each once."""
    with store._changed:
        held = [*store._held.values(), *store._aside.values()]
    fds = {slab.fd for one in held for slab in one.slabs}
    return sum(os.fstat(fd).st_blocks * 512 for fd in fds)


class Accounts(RuleBasedStateMachine):
    """Whatever happens in whatever order, the account is right: memory is neither promised twice
    nor lost.
    """

    LIMIT = 40 * 4 * 4096

    def __init__(self, versions: list[Checkpoint]) -> None:
        super().__init__()
        self.store = Store(available=lambda: self.LIMIT - self.taken())
        self.seen: set[Slab] = set()
        self.versions = versions
        self.stagings: dict[int, Any] = {}

    def taken(self) -> int:
        """As the kernel counts: a slab that has left the table is taken until its last user has
        let go of it, which may be a version that is being begun.
        """
        with self.store._changed:
            for one in (*self.store._held.values(), *self.store._aside.values()):
                self.seen.update(one.slabs)
        nbytes = 0
        for slab in self.seen:
            with contextlib.suppress(OSError):  # freed by another thread
                nbytes += os.fstat(slab.fd).st_blocks * 512
        return nbytes

    @rule(number=st.integers(0, 4))
    def begin(self, number: int) -> None:
        version = self.versions[number]
        if version.manifest.digest in {held.digest for held in self.store.versions()}:
            return
        free = self.store.usage().free
        try:
            self.stagings[number] = self.store.begin(version.manifest)
        except NoCapacity:
            return
        assert self.stagings[number].builder.new_nbytes <= free

    @precondition(lambda self: self.stagings)
    @rule(data=st.data(), count=st.integers(1, 12))
    def put(self, data: st.DataObject, count: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.stagings)))
        builder = self.stagings[number].builder
        for blake3 in builder.missing[:count]:
            assert builder.put(blake3, self.versions[number].data[blake3])

    @precondition(lambda self: self.stagings)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.stagings)))
        with self.stagings.pop(number) as staging:
            if not staging.builder.missing:
                staging.commit()

    @rule(number=st.integers(0, 4))
    def release(self, number: int) -> None:
        self.store.release(self.versions[number].manifest.digest)

    @invariant()
    def the_account_is_right(self) -> None:
        assert self.store.settle()
        usage = self.store.usage()
        assert usage.promised >= sum(
            staging.builder.nbytes(blake3)
            for staging in self.stagings.values()
            for blake3 in staging.builder.missing
        )
        assert usage.held + usage.promised <= self.LIMIT
        assert usage.held == taken(self.store) == self.taken()

    @invariant()
    def every_chunk_is_itself(self) -> None:
        for version in self.store.versions():
            if version.phase == "Staged":
                content = next(v for v in self.versions if v.manifest.digest == version.digest)
                assert all(
                    read(self.store, blake3) == data for blake3, data in content.data.items()
                )

    def teardown(self) -> None:
        for staging in self.stagings.values():
            with staging:
                pass
        for version in self.store.versions():
            self.store.release(version.digest)
        while (aside := self.store._oldest_aside(None)) is not None:
            self.store._end_aside(aside)
        assert self.store.settle()
        assert self.store.usage().held == self.store.usage().promised == 0


@pytest.mark.timeout(300)  # threads free memory at every step
def test_the_account_is_right_whatever_happens(checkpoint: NewCheckpoint) -> None:
    versions = [checkpoint(f"v{number}", seeds) for number, seeds in enumerate(SEEDS)]
    # any factory does; its type says class
    machine = cast(type[RuleBasedStateMachine], lambda: Accounts(versions))
    run_state_machine_as_test(machine, settings=settings(max_examples=15, stateful_step_count=20))
