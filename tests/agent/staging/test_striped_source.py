"""Stripes of one version from several donors."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotweights_agent.staging.store import Store
from hotweights_agent.staging.striped_source import StripedSource, fetch_ranges_concurrent
from hotweights_transports.peers.base import (
    Deliver,
    Missing,
    PeerClient,
    PeerCorrupt,
    PeerMissing,
    PeerServer,
    PeerTimeout,
    PeerUnreachable,
    Want,
)

WANTS = [Want(f"{number:064x}", 1) for number in range(60)]


@dataclass(eq=False)
class Donor(PeerClient):
    """Gives what it has, until it dies after so many chunks."""

    address: str
    lacks: frozenset[str] = frozenset()
    dies_after: int = 10**9
    version_known: bool = True
    window: int = 4
    gave: list[str] = field(default_factory=list)

    def fetch_manifest(self, digest: str, most_nbytes: int = 0) -> bytes:
        raise NotImplementedError

    def fetch_chunks(
        self,
        digest: str,
        wanted: Iterable[Want],
        deliver: Deliver,
        *,
        cancel: threading.Event | None = None,
    ) -> list[Missing]:
        missing: list[Missing] = []
        asked: list[Want] = []
        stream = iter(wanted)
        while True:
            while len(asked) < self.window and (want := next(stream, None)) is not None:
                asked.append(want)
            if not asked:
                return missing
            if len(self.gave) >= self.dies_after:
                raise PeerUnreachable(self.address, "the test says so")
            want = asked.pop(0)
            if want.blake3 in self.lacks:
                missing.append(Missing(want, self.version_known))
            else:
                deliver(want, memoryview(b"x"))
                self.gave.append(want.blake3)

    def ask(self, group: str) -> bytes:
        raise PeerMissing(self.address, "it leads no group")

    def close(self) -> None:
        pass


def fetched(donors: list[Donor], concurrency: int = 8) -> tuple[set[str], list[Missing]]:
    got: set[str] = set()
    lock = threading.Lock()

    def deliver(want: Want, data: memoryview) -> None:
        with lock:
            assert want.blake3 not in got
            got.add(want.blake3)

    missing = fetch_ranges_concurrent(
        donors, "sha256:x", iter(WANTS), deliver, concurrency=concurrency
    )
    return got, missing


def test_every_chunk_comes_once() -> None:
    got, missing = fetched([Donor("a"), Donor("b"), Donor("c")])
    assert (len(got), missing) == (len(WANTS), [])


def test_what_a_dead_donor_leaves_behind_comes_from_the_others() -> None:
    got, missing = fetched([Donor("a", dies_after=3), Donor("b")])
    assert (len(got), missing) == (len(WANTS), [])


def test_donors_beyond_the_limit_stand_in_for_those_that_fail() -> None:
    spare = Donor("spare")
    got, _ = fetched([Donor("a", dies_after=1), spare], concurrency=1)
    assert len(got) == len(WANTS)
    assert len(spare.gave) == len(WANTS) - 1
    idle = Donor("idle")
    fetched([Donor("a"), idle], concurrency=1)
    assert idle.gave == []


def test_a_chunk_that_one_lacks_comes_from_another() -> None:
    lacks = frozenset(want.blake3 for want in WANTS[::2])
    got, missing = fetched([Donor("a", lacks=lacks), Donor("b")])
    assert (len(got), missing) == (len(WANTS), [])


def test_when_all_die_it_says_why() -> None:
    with pytest.raises(PeerUnreachable, match="the test says so"):
        fetched([Donor("a", dies_after=3), Donor("b", dies_after=4)])


def test_nobody_knows_the_version_yet() -> None:
    everything = frozenset(want.blake3 for want in WANTS)
    _, missing = fetched([Donor("a", lacks=everything, version_known=False)])
    assert {gap.want.blake3 for gap in missing} == everything
    assert not any(gap.version_known for gap in missing)


@pytest.mark.timeout(300)  # a hundred times a few threads
@given(
    st.lists(
        st.tuples(st.integers(0, 80), st.sets(st.integers(0, 59), max_size=8)),
        min_size=1,
        max_size=5,
    )
)
def test_nothing_is_lost_whatever_donors_do(donors: list[tuple[int, set[int]]]) -> None:
    played = [
        Donor(str(n), frozenset(WANTS[i].blake3 for i in lacks), dies)
        for n, (dies, lacks) in enumerate(donors)
    ]
    try:
        got, missing = fetched(played)
    except PeerUnreachable:
        return  # the fetch's account knows what was not delivered
    assert got.isdisjoint(gap.want.blake3 for gap in missing)
    if any(dies > 60 and not lacks for dies, lacks in donors):
        assert len(got) == len(WANTS)


def test_what_a_slow_donor_owes_comes_from_a_quick_one() -> None:
    """The slow one gives one chunk and then hangs on its window until it is called off."""

    class Slow(Donor):
        def fetch_chunks(
            self,
            digest: str,
            wanted: Iterable[Want],
            deliver: Deliver,
            *,
            cancel: threading.Event | None = None,
        ) -> list[Missing]:
            stream = iter(wanted)
            window = [next(stream) for _ in range(20)]
            deliver(window[0], memoryview(b"x"))
            self.gave.append(window[0].blake3)
            owing.set()  # not before, or the quick one might bring the first one too
            assert cancel is not None
            assert cancel.wait(30), "nobody called it off"
            return []

    class Quick(Donor):
        def fetch_chunks(self, *args: Any, **kwargs: Any) -> list[Missing]:
            owing.wait(30)
            return super().fetch_chunks(*args, **kwargs)

    owing = threading.Event()
    slow, quick = Slow("slow"), Quick("quick")
    got, missing = fetched([slow, quick])
    assert (len(got), missing) == (len(WANTS), [])
    assert len(quick.gave) == len(WANTS) - 1


def _noting(got: list[Want]) -> Deliver:
    return lambda want, _: got.append(want)


def test_a_donor_that_lied_is_not_asked_again() -> None:
    class Liar(Donor):
        def fetch_chunks(self, *args: Any, **kwargs: Any) -> list[Missing]:
            asked.append(self.address)
            want = next(iter(args[1]), None)
            lied.set()
            if want is None:
                return []
            raise PeerCorrupt(self.address, f"chunk {want.blake3} is another one")

    class Honest(Donor):
        def fetch_chunks(self, *args: Any, **kwargs: Any) -> list[Missing]:
            lied.wait(30)  # or it might have given all before the other one is asked
            return super().fetch_chunks(*args, **kwargs)

    asked: list[str] = []
    lied = threading.Event()
    source = StripedSource([Liar("liar"), Honest("honest")], "sha256:x")
    for _ in range(3):
        got: list[Want] = []
        missing = source.fetch(iter(WANTS), _noting(got), threading.Event())
        assert (len(got), missing) == (len(WANTS), [])
    assert asked.count("liar") == 1
    alone = StripedSource([Liar("a"), Liar("b")], "sha256:x")
    for _ in range(2):
        with pytest.raises(PeerCorrupt):
            alone.fetch(iter(WANTS), lambda want, _: None, threading.Event())


def test_real_donors_share_a_version(
    checkpoint: Callable[..., object],
    serve: Callable[[Store], PeerServer],
    connect: Callable[[str], PeerClient],
) -> None:
    version = checkpoint("v1", tuple(range(24)))
    manifest, data = version.manifest, version.data  # type: ignore[attr-defined]
    stores = [Store(available=lambda: 1 << 30) for _ in range(2)]
    for store in stores:
        staging = store.begin(manifest)
        for blake3, content in data.items():
            staging.builder.put(blake3, content)
        staging.commit()
    donors = [connect(serve(store).address) for store in stores]
    source = StripedSource(donors, manifest.digest)
    got: dict[str, bytes] = {}
    lock = threading.Lock()

    def deliver(want: Want, view: memoryview) -> None:
        with lock:
            got[want.blake3] = bytes(view)

    wants = [Want(blake3, len(content)) for blake3, content in data.items()]
    random.Random(1).shuffle(wants)
    assert source.fetch(iter(wants), deliver, threading.Event()) == []
    assert got == data
    for store in stores:
        store.release(manifest.digest)


def test_an_unreachable_donor_costs_only_its_share(connect: Callable[[str], PeerClient]) -> None:
    dead = connect("tcp://127.0.0.1:9")
    good = Donor("good")
    got: set[str] = set()
    missing = fetch_ranges_concurrent(
        [dead, good], "sha256:x", iter(WANTS), lambda want, _: got.add(want.blake3)
    )
    assert (len(got), missing) == (len(WANTS), [])
    with pytest.raises((PeerUnreachable, PeerTimeout)):
        fetch_ranges_concurrent([dead], "sha256:x", iter(WANTS), lambda want, _: None)
