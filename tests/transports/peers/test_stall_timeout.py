"""How long a puller bears with a peer: no clock, only times."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotweights_transports.peers.base import ClientLimits, PeerTimeout
from hotweights_transports.peers.rate_limiter import RateLimiter
from hotweights_transports.peers.stall_timeout import StallTimeout

RELAXED = settings(max_examples=50)

LIMITS = ClientLimits(
    silence_seconds=10, stall_seconds=30, floor_bytes_per_second=1000, floor_window_seconds=5
)


@pytest.fixture
def patience() -> StallTimeout:
    return StallTimeout("tcp://a:1", LIMITS, now=0.0)


def test_silence(patience: StallTimeout) -> None:
    patience.waiting(4.0)
    patience.check(13.9)
    with pytest.raises(PeerTimeout, match="not a byte for 10 s"):
        patience.check(14.1)


def test_what_we_take_long_with_ourselves_is_not_its_rate(patience: StallTimeout) -> None:
    """A chunk of 4 MB in a second, and nine seconds until our own limit lets the next one in."""
    slow = StallTimeout("tcp://a:1", dataclasses.replace(LIMITS, floor_bytes_per_second=10**6), 0.0)
    for second in range(0, 60, 10):
        for one in (patience, slow):
            one.received(4_000_000, second + 1.0)
            one.kept_waiting(9.0)
            one.answered(second + 10.0)
            one.check(second + 10.0)


def test_a_peer_that_only_says_that_it_lives_stalls(patience: StallTimeout) -> None:
    for now in range(1, 31):
        patience.waiting(float(now))
        patience.check(float(now))
    patience.waiting(31.0)
    with pytest.raises(PeerTimeout, match="completed no chunk for 30 s"):
        patience.check(31.0)


def test_answers_end_the_stall(patience: StallTimeout) -> None:
    for now in range(1, 200):
        patience.waiting(float(now))
        if now % 20 == 0:
            patience.answered(float(now))
        patience.check(float(now))


def test_a_trickle_is_below_the_floor(patience: StallTimeout) -> None:
    for tenth in range(1, 50):
        patience.received(99, tenth / 10)
        patience.check(tenth / 10)
    with pytest.raises(PeerTimeout, match="the floor is 1000"):
        patience.check(5.1)


def test_waiting_is_not_held_against_the_rate(patience: StallTimeout) -> None:
    patience.received(10, 1.0)
    patience.waiting(4.0)
    patience.check(8.9)
    patience.received(6000, 8.95)
    patience.check(9.1)


@RELAXED
@given(st.floats(1, 1000), st.integers(1001, 10**9))
def test_a_steady_rate_above_the_floor_is_never_given_up(step_seconds: float, rate: int) -> None:
    step_seconds = min(step_seconds, 9.0)
    patience = StallTimeout("tcp://a:1", LIMITS, now=0.0)
    for number in range(1, 50):
        now = number * step_seconds
        patience.received(int(rate * step_seconds) + 1, now)
        patience.answered(now)
        patience.check(now)


@RELAXED
@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 3)), min_size=1, max_size=40))
def test_the_throttle_never_gives_more_than_its_rate(takes: list[tuple[int, float]]) -> None:
    throttle = RateLimiter(1_000_000, burst_seconds=0.1)
    now = 0.0
    taken = 0
    for nbytes, pause in takes:
        now += pause
        now += throttle.delay_seconds(nbytes, now)  # the bytes go now
        assert taken <= 1_000_000 * (now + 0.1) + 1
        taken += nbytes


def test_a_limit_that_lets_nothing_through_is_refused() -> None:
    with pytest.raises(ValueError, match="lets nothing through"):
        RateLimiter(0)
