"""Which donors are asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotweights_planner.nearest_donors import Distance, Spot, choose, distance, nearest_first

HERE = Spot("here", "10.1.2.3", "")


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        (Spot("a", "10.1.2.3"), Distance.SAME_HOST),
        (Spot("a", "127.0.0.1"), Distance.SAME_HOST),
        (Spot("a", "localhost"), Distance.SAME_HOST),
        (Spot("a", "10.1.2.200"), Distance.SAME_ZONE),
        (Spot("a", "10.1.9.3"), Distance.SAME_NETWORK),
        (Spot("a", "10.9.2.3"), Distance.ELSEWHERE),
        (Spot("a", "fd00::1"), Distance.ELSEWHERE),
        (Spot("a", "node-7"), Distance.ELSEWHERE),
        (Spot("a", ""), Distance.ELSEWHERE),
    ],
)
def test_an_address_tells_how_far_it_is(there: Spot, expected: Distance) -> None:
    assert distance(HERE, there) is expected


def test_named_zones_go_before_addresses() -> None:
    here = Spot("here", "10.1.2.3", "rack-1")
    assert distance(here, Spot("a", "10.9.9.9", "rack-1")) is Distance.SAME_ZONE
    assert distance(here, Spot("a", "10.1.2.4", "rack-2")) is Distance.SAME_NETWORK


def test_ipv6_neighbourhoods() -> None:
    here = Spot("here", "fd00:1:2:3::1")
    assert distance(here, Spot("a", "fd00:1:2:3::9")) is Distance.SAME_ZONE
    assert distance(here, Spot("a", "fd00:1:2:4::9")) is Distance.SAME_NETWORK


def test_far_donors_are_taken_only_until_there_are_two() -> None:
    near = [Spot(f"n{i}", f"10.1.2.{10 + i}") for i in range(3)]
    far = [Spot(f"f{i}", f"10.9.2.{i}") for i in range(3)]
    assert {spot.name for spot in choose(HERE, near + far)} == {"n0", "n1", "n2"}
    first, *others = choose(HERE, near[:1] + far)
    assert (first.name, len(others)) == ("n0", 1)
    assert choose(HERE, []) == []
    assert len(choose(HERE, near, at_most=2)) == 2


def test_a_crowd_does_not_fall_upon_one_donor() -> None:
    donors = [Spot(f"d{i}", f"10.1.2.{i}") for i in range(4)]
    first = {nearest_first(Spot(f"w{i}", "10.1.2.99"), donors)[0].name for i in range(64)}
    assert first == {"d0", "d1", "d2", "d3"}


spots = st.builds(
    Spot,
    st.text(max_size=8),
    st.one_of(st.ip_addresses().map(str), st.text(max_size=12)),
    st.sampled_from(["", "a", "b"]),
)


@given(spots, st.lists(spots, max_size=12))
def test_the_order_is_by_distance_and_loses_nobody(here: Spot, others: list[Spot]) -> None:
    ordered = nearest_first(here, others)
    assert sorted(ordered, key=repr) == sorted(others, key=repr)
    distances = [distance(here, spot) for spot in ordered]
    assert distances == sorted(distances)
