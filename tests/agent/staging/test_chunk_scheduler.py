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
