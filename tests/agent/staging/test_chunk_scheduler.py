"""Which source is asked for what, when."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotweights_agent.staging.chunk_scheduler import ChunkScheduler
from hotweights_transports.peers.base import Want

RELAXED = settings(max_examples=50)

WANTS = [Want(f"{number:064x}", 10) for number in range(6)]


def drain(scheduler: ChunkScheduler, source: int) -> list[int]:
    taken = []
    while (want := scheduler.take(source)) is not None:
        taken.append(int(want.blake3, 16))
    return taken


def test_everything_is_asked_of_the_first_source_in_order() -> None:
    scheduler = ChunkScheduler(WANTS, 3, 1)
    assert drain(scheduler, 1) == drain(scheduler, 2) == []
    assert drain(scheduler, 0) == [0, 1, 2, 3, 4, 5]
    for want in WANTS:
        scheduler.arrived(0, want.blake3)
    assert scheduler.done
    assert scheduler.fetched_nbytes == [60, 0, 0]


def test_what_a_source_lacks_goes_to_the_next() -> None:
    scheduler = ChunkScheduler(WANTS, 2, 1)
    drain(scheduler, 0)
    scheduler.arrived(0, WANTS[0].blake3)
    scheduler.returned(0, again={WANTS[5].blake3})
    assert drain(scheduler, 0) == [5]
    assert drain(scheduler, 1) == [1, 2, 3, 4]


def test_what_a_dead_source_had_not_brought_goes_to_the_next_in_load_order() -> None:
    scheduler = ChunkScheduler(WANTS, 2, 1)
    for _ in range(3):
        scheduler.take(0)
    scheduler.arrived(0, WANTS[1].blake3)
    scheduler.failed(0)
    assert not scheduler.has_work(0)
    assert drain(scheduler, 1) == [0, 2, 3, 4, 5]


def test_rounds_are_bounded() -> None:
    scheduler = ChunkScheduler(WANTS[:1], 2, 2)
    asked = []
    while scheduler.exhausted is None:
        for source in range(2):
            if scheduler.take(source):
                asked.append(source)
                scheduler.returned(source)
    assert asked == [0, 1, 0, 1]
    assert scheduler.exhausted == WANTS[0]


def test_a_liar_is_not_asked_again() -> None:
    scheduler = ChunkScheduler(WANTS[:2], 2, 3)
    scheduler.failed(0, ban=True)
    assert scheduler.is_banned(0)
    for _ in range(3):
        assert drain(scheduler, 1) == [0, 1]
        scheduler.returned(1)
        assert not scheduler.has_work(0)
    assert scheduler.exhausted is not None


def test_only_liars_left() -> None:
    scheduler = ChunkScheduler(WANTS[:1], 1, 3)
    scheduler.failed(0, ban=True)
    assert scheduler.exhausted == WANTS[0]


def test_a_chunk_that_came_from_elsewhere_is_not_asked_for() -> None:
    scheduler = ChunkScheduler(WANTS, 1, 1)
    scheduler.arrived(0, WANTS[2].blake3)
    assert drain(scheduler, 0) == [0, 1, 3, 4, 5]


@pytest.mark.parametrize(("sources", "rounds"), [(0, 1), (1, 0)])
def test_no_sources_or_no_rounds_are_refused(sources: int, rounds: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        ChunkScheduler(WANTS, sources, rounds)


@RELAXED
@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.integers(0, 6))
def test_no_chunk_is_lost_and_it_always_ends(
    data: st.DataObject, sources: int, rounds: int, count: int
) -> None:
    scheduler = ChunkScheduler(WANTS[:count], sources, rounds)
    arrived: set[str] = set()
    for _ in range(count * sources * rounds * 3 + 10):
        if scheduler.done or scheduler.exhausted is not None:
            break
        busy = [source for source in range(sources) if scheduler.has_work(source)]
        assert busy  # nothing is out, so what is open must be queued somewhere
        source = data.draw(st.sampled_from(busy))
        taken = [scheduler.take(source) for _ in range(data.draw(st.integers(1, 6)))]
        for want in taken:
            if want is not None and data.draw(st.booleans()):
                scheduler.arrived(source, want.blake3)
                assert want.blake3 not in arrived
                arrived.add(want.blake3)
        match data.draw(st.sampled_from(["returned", "failed", "lied"])):
            case "returned":
                scheduler.returned(source)
            case what:
                scheduler.failed(source, ban=what == "lied")
    assert scheduler.done == (len(arrived) == count)
    assert scheduler.done or scheduler.exhausted is not None
    assert sum(scheduler.fetched_nbytes) == 10 * len(arrived)


def test_the_end_of_what_waits_is_lent_and_both_meet() -> None:
    scheduler = ChunkScheduler(WANTS, 3, 1)
    scheduler.take(0)
    assert scheduler.waiting_nbytes(0) == 50
    scheduler.lend(0, 1, 35)
    assert scheduler.waiting_nbytes(0) == 20
    assert scheduler.take(1) == WANTS[3]
    assert drain(scheduler, 0) == [1, 2, 5, 4, 3], "what it lent too, also what is on its way"
    assert drain(scheduler, 1) == []
    for number, want in enumerate(WANTS):
        scheduler.arrived(1 if number == 3 else 0, want.blake3)
    assert scheduler.done
    assert scheduler.fetched_nbytes == [50, 10, 0]


@pytest.mark.parametrize("how", ["lacks it", "is behind", "fails", "lies"])
def test_what_a_helper_does_not_bring_goes_back(how: str) -> None:
    scheduler = ChunkScheduler(WANTS, 3, 1)
    scheduler.take(0)
    scheduler.lend(0, 1, 20)
    assert drain(scheduler, 1) == [4, 5]
    if how in ("lacks it", "is behind"):
        scheduler.returned(1, again=[WANTS[4].blake3] if how == "is behind" else [])
    else:
        scheduler.failed(1, ban=how == "lies")
    assert not scheduler.has_work(1)
    assert not scheduler.has_work(2), "nobody goes past the one that lent it"
    assert drain(scheduler, 0) == [1, 2, 3, 4, 5]


def test_what_was_lent_is_the_helper_s_when_the_lender_fails() -> None:
    scheduler = ChunkScheduler(WANTS, 3, 1)
    scheduler.lend(0, 1, 20)
    scheduler.failed(0, ban=True)
    assert drain(scheduler, 1) == [0, 1, 2, 3, 4, 5]
    assert not scheduler.has_work(0)
    scheduler.returned(1)
    assert drain(scheduler, 2) == [0, 1, 2, 3, 4, 5]


MOVES = st.tuples(
    st.sampled_from(("take", "lend", "bring", "lack", "fail", "lie")),
    st.integers(0, 2),
    st.integers(0, 60),
)


@RELAXED
@given(st.lists(MOVES, max_size=60))
def test_whatever_is_lent_everything_comes_or_somebody_hears_of_it(
    moves: list[tuple[str, int, int]],
) -> None:
    scheduler = ChunkScheduler(WANTS, 3, 3)
    asked: list[list[Want]] = [[], [], []]
    for what, source, nbytes in moves:
        match what:
            case "take":
                want = scheduler.take(source)
                asked[source] += [want] if want else []
            case "lend":
                scheduler.lend(source, (source + 1) % 3, nbytes)
            case "bring" if asked[source]:
                scheduler.arrived(source, asked[source].pop().blake3)
            case "lack":
                scheduler.returned(source)
            case "fail" | "lie":
                scheduler.failed(source, ban=what == "lie")
    for _ in range(20):
        for source in range(3):
            while (want := scheduler.take(source)) is not None:
                scheduler.arrived(source, want.blake3)
            scheduler.returned(source)
    assert scheduler.done or scheduler.exhausted is not None
    assert scheduler.exhausted is not None or not any(map(scheduler.has_work, range(3)))
