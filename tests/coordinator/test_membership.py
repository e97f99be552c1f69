"""Who is alive, and who pulls from whom."""

from __future__ import annotations

from hotweights_coordinator.state.membership import Presence
from hotweights_coordinator.state.state import Current, Durable, Worker
from hotweights_coordinator.wire.messages import Applied

DIGEST = "sha256:" + "0" * 64


def workers(*names: str) -> dict[str, Worker]:
    return {name: Worker(name, name, (f"tcp://10.0.{ord(name[0])}.1:1",)) for name in names}


def test_who_is_not_heard_for_a_ttl_is_silent() -> None:
    presence, group = Presence(15.0), workers("a", "b")
    presence.led(group, 0.0)
    for now in range(1, 16):
        presence.heard("a", None, float(now))
        assert presence.silent(group, float(now), 1.0) == []
    assert presence.silent(group, 16.0, 1.0) == ["b"]


def test_a_coordinator_that_slept_does_not_blame_the_workers() -> None:
    presence, group = Presence(15.0), workers("a", "b")
    presence.led(group, 0.0)
    presence.silent(group, 1.0, 1.0)
    assert presence.silent(group, 500.0, 1.0) == []
    presence.heard("a", None, 501.0)
    for now in range(501, 512):
        presence.silent(group, float(now), 1.0)
    assert presence.silent(group, 516.5, 1.0) == ["b"]


def test_forgets_what_those_said_who_are_gone() -> None:
    presence = Presence(15.0)
    presence.led(workers("a"), 0.0)
    presence.heard("a", (DIGEST,), 0.0)
    presence.silent({}, 1.0, 1.0)
    assert presence.have_of("a") == ()


def test_applied_is_what_was_decided_by_that_token() -> None:
    presence = Presence(15.0)
    durable = Durable(current=Current("v1", DIGEST, 7, "p", "u", "m"), workers=workers("a", "b"))
    presence.applied["a"] = Applied(digest=DIGEST, token=6)
    presence.applied["b"] = Applied(digest=DIGEST, token=7)
    assert presence.have_applied(durable) == ["b"]


def test_routes_lead_to_donors_and_hold_while_others_come() -> None:
    presence, group = Presence(15.0), workers("a", "b", "c")
    presence.led(group, 0.0)
    presence.heard("c", (DIGEST,), 0.0)
    assert presence.route("a", DIGEST, group, 0.0).parents == ("c",)
    before = {name: presence.route(name, DIGEST, group, 0.0) for name in "abc"}
    more = group | workers("d")
    assert presence.route("d", DIGEST, more, 1.0).parents
    assert {name: presence.route(name, DIGEST, more, 1.0).parents for name in "abc"} == {
        name: route.parents for name, route in before.items()
    }


def test_routes_of_a_big_group_are_not_made_anew_for_everybody() -> None:
    presence = Presence(15.0)
    group = workers(*(f"w{n}" for n in range(1000)))
    first = presence.route("w1", DIGEST, group, 0.0)
    more = group | workers("x")
    assert presence.route("x", DIGEST, more, 0.01).parents, "for a moment it stands behind the last one"
    assert presence.route("w1", DIGEST, more, 0.01) is first
    assert presence.route("x", DIGEST, more, 0.5).parents


def test_without_donors_one_reads_the_origin() -> None:
    presence, group = Presence(15.0), workers("a", "b", "c")
    routes = [presence.route(name, DIGEST, group, 0.0) for name in "abc"]
    assert [route.reads_origin for route in routes] == [True, False, False]
    assert routes[1].parents == ("a",)
