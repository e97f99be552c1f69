"""Who is alive, and who pulls from whom."""

from __future__ import annotations

from hotweights_coordinator.state.membership import Membership
from hotweights_coordinator.state.state import CoordinatorState, Current, Worker
from hotweights_coordinator.wire.messages import Applied

DIGEST = "sha256:" + "0" * 64


def workers(*names: str) -> dict[str, Worker]:
    return {name: Worker(name, name, (f"tcp://10.0.{ord(name[0])}.1:1",)) for name in names}


def test_who_is_not_heard_for_a_ttl_is_silent() -> None:
    membership, group = Membership(15.0), workers("a", "b")
    membership.led(group, 0.0)
    for now in range(1, 16):
        membership.heard("a", None, float(now))
        assert membership.silent(group, float(now), 1.0) == []
    assert membership.silent(group, 16.0, 1.0) == ["b"]


def test_a_coordinator_that_slept_does_not_blame_the_workers() -> None:
    membership, group = Membership(15.0), workers("a", "b")
    membership.led(group, 0.0)
    membership.silent(group, 1.0, 1.0)
    assert membership.silent(group, 500.0, 1.0) == []
    membership.heard("a", None, 501.0)
    for now in range(501, 512):
        membership.silent(group, float(now), 1.0)
    assert membership.silent(group, 516.5, 1.0) == ["b"]


def test_forgets_what_those_said_who_are_gone() -> None:
    membership = Membership(15.0)
    membership.led(workers("a"), 0.0)
    membership.heard("a", (DIGEST,), 0.0)
    membership.silent({}, 1.0, 1.0)
    assert membership.have_of("a") == ()


def test_applied_is_what_was_decided_by_that_token() -> None:
    membership = Membership(15.0)
    durable = CoordinatorState(
        current=Current("v1", DIGEST, 7, "p", "u", "m"), workers=workers("a", "b")
    )
    membership.applied["a"] = Applied(digest=DIGEST, token=6)
    membership.applied["b"] = Applied(digest=DIGEST, token=7)
    assert membership.have_applied(durable) == ["b"]


def test_routes_lead_to_donors_and_hold_while_others_come() -> None:
    membership, group = Membership(15.0), workers("a", "b", "c")
    membership.led(group, 0.0)
    membership.heard("c", (DIGEST,), 0.0)
    assert membership.route("a", DIGEST, group, 0.0).parents == ("c",)
    before = {name: membership.route(name, DIGEST, group, 0.0) for name in "abc"}
    more = group | workers("d")
    assert membership.route("d", DIGEST, more, 1.0).parents
    assert {name: membership.route(name, DIGEST, more, 1.0).parents for name in "abc"} == {
        name: route.parents for name, route in before.items()
    }


def test_routes_of_a_big_group_are_not_made_anew_for_everybody() -> None:
    membership = Membership(15.0)
    group = workers(*(f"w{n}" for n in range(1000)))
    first = membership.route("w1", DIGEST, group, 0.0)
    more = group | workers("x")
    assert membership.route("x", DIGEST, more, 0.01).parents, (
        "for a moment it stands behind the last one"
    )
    assert membership.route("w1", DIGEST, more, 0.01) is first
    assert membership.route("x", DIGEST, more, 0.5).parents


def test_without_donors_one_reads_the_origin() -> None:
    membership, group = Membership(15.0), workers("a", "b", "c")
    routes = [membership.route(name, DIGEST, group, 0.0) for name in "abc"]
    assert [route.reads_origin for route in routes] == [True, False, False]
    assert routes[1].parents == ("a",)
