"""One step of a WeightVersion: who is asked, what an answer means, and what is said about it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hotweights_crds.conditions import find, is_true
from hotweights_crds.nodeweights import ResolvedVersion, ResolveItem
from hotweights_crds.weightversion import WeightVersionSpec
from hotweights_operator.decide import versions
from hotweights_operator.model.actions import AskResolve, VersionDecision
from hotweights_operator.model.objects import NodeState, Refusal, Version
from tests.operator.worlds import NEW, NOW, OLD, state, version, world

PIN = "sha256:" + "1" * 64
WAITS = version("v", "")


def asked(known: NodeState, *answers: ResolvedVersion, uid: str = WAITS.uid) -> NodeState:
    """A node whose agent is asked, and has answered."""
    item = ResolveItem(
        uid=uid, namespace="models", name="v", model="m", version="v", uri="file:///v"
    )
    spec = known.spec.model_copy(update={"resolve": [item]})
    return replace(
        known, spec=spec, status=known.status.model_copy(update={"resolved": list(answers)})
    )


def pinned() -> Version:
    """A version that says which digest it must have."""
    plain = {
        "model": "m",
        "version": "v",
        "source": {"uri": "file:///v"},
        "manifest": {"digest": PIN},
    }
    return replace(WAITS, spec=WeightVersionSpec.from_dict(plain))


def said(decision: VersionDecision) -> tuple[str, str, set[str]]:
    """The digest, why, and which conditions are True."""
    if decision.status is None:
        raise LookupError("nothing is said")
    resolved = find(decision.status.conditions, "Resolved")
    true = {
        c.type for c in decision.status.conditions if is_true(decision.status.conditions, c.type)
    }
    return decision.status.digest, resolved.reason if resolved else "", true


def asks(decision: VersionDecision) -> list[AskResolve]:
    """All that it does."""
    return [action for action in decision.actions if isinstance(action, AskResolve)]


def answer(**more: Any) -> ResolvedVersion:
    """What an agent found."""
    return ResolvedVersion(**{"uid": WAITS.uid, **more})


def test_an_answer_is_the_version_s_identity_and_told_once() -> None:
    seen = world([], [asked(state("n0"), answer(digest=NEW, nbytes=1, tensors=2, chunks=3))])
    decision = versions.decide(WAITS, seen, NOW)
    assert said(decision) == (NEW, "Resolved", {"Resolved", "Ready"})
    assert [(event.reason, event.warning) for event in decision.events] == [("Resolved", False)]
    assert decision.status is not None
    again = versions.decide(replace(WAITS, status=decision.status), seen, NOW)
    assert (again.events, said(again)) == ((), said(decision))


def test_a_source_with_another_digest_than_is_pinned_is_not_used() -> None:
    decision = versions.decide(pinned(), world([], [asked(state("n0"), answer(digest=NEW))]), NOW)
    assert said(decision) == ("", "DigestMismatch", {"Stalled"})
    assert PIN in decision.events[0].message
    assert (
        said(versions.decide(pinned(), world([], [asked(state("n0"), answer(digest=PIN))]), NOW))[0]
        == PIN
    )


def test_the_agent_is_told_what_is_pinned() -> None:
    (action,) = asks(versions.decide(pinned(), world([], [state("n0")]), NOW))
    assert action.item is not None
    assert (action.item.digest, action.item.uri, action.resource_version) == (
        PIN,
        "file:///v",
        "50",
    )


def test_a_source_that_cannot_be_read_stalls_until_it_can() -> None:
    seen = world(
        [], [asked(state("n0"), answer(reason="SourceNotAllowed", message="no root holds it"))]
    )
    decision = versions.decide(WAITS, seen, NOW)
    assert said(decision) == ("", "SourceNotAllowed", {"Stalled"})
    assert [(event.reason, event.warning) for event in decision.events] == [
        ("SourceNotAllowed", True)
    ]
    assert decision.status is not None
    known = replace(WAITS, status=decision.status)
    assert versions.decide(known, seen, NOW).events == ()
    well = world([], [asked(state("n0"), answer(digest=NEW))])
    assert said(versions.decide(known, well, NOW)) == (NEW, "Resolved", {"Resolved", "Ready"})


LACKS = answer(reason="SourceNotFound", message="/models/v does not exist on this node")


def test_a_source_that_one_node_lacks_is_looked_for_on_another() -> None:
    """Its folder may be on some nodes only: those with GPUs, of one pool."""
    seen = world([], [asked(state("n0"), LACKS), state("n1", listed=())])
    decision = versions.decide(WAITS, seen, NOW)
    assert said(decision) == ("", "Resolving", {"Reconciling"})
    assert [(one.node, one.item is None) for one in asks(decision)] == [("n1", False)]
    seen = world([], [asked(state("n0"), LACKS), asked(state("n1"))])
    assert versions.decide(WAITS, seen, NOW).actions == ()
    for found in ([LACKS], [answer(digest=NEW)]), ([answer(digest=NEW)], [LACKS]):
        seen = world([], [asked(state(f"n{n}"), *said_there) for n, said_there in enumerate(found)])
        assert said(versions.decide(WAITS, seen, NOW))[0] == NEW


def test_a_source_that_no_node_has_is_looked_for_on_a_few() -> None:
    everywhere = [asked(state("n0"), LACKS)]
    assert said(versions.decide(WAITS, world([], everywhere), NOW))[1:] == (
        "SourceNotFound",
        {"Stalled"},
    )
    looked = [asked(state(f"n{n}"), LACKS) for n in range(versions.MAX_READERS)]
    decision = versions.decide(WAITS, world([], [*looked, state("other")]), NOW)
    assert said(decision)[1:] == ("SourceNotFound", {"Stalled"})
    assert decision.actions == ()


def test_nodes_with_pods_of_the_namespace_are_asked_first() -> None:
    states = [state(f"n{n}") for n in range(8)] + [state("used", told={"p0": OLD})]
    for number in range(10):
        (action,) = versions.decide(version(f"v{number}", ""), world([], states), NOW).actions
        assert action.node == "used"


@pytest.mark.parametrize(
    ("agents", "reason"), [({"n0": True}, "Resolving"), ({"n0": False}, "NoAgent")]
)
def test_what_is_waited_for_is_no_failure(agents: dict[str, bool], reason: str) -> None:
    assert said(versions.decide(WAITS, world([], [state("n0")], agents=agents), NOW)) == (
        "",
        reason,
        {"Reconciling"},
    )


def test_what_was_answered_to_others_or_not_asked_counts_for_nothing() -> None:
    for known in (
        asked(state("n0"), answer(uid="another", digest=OLD)),
        asked(state("n0"), answer(digest=OLD), uid="x"),
    ):
        assert said(versions.decide(WAITS, world([], [known]), NOW))[:2] == ("", "Resolving")


def test_one_living_agent_is_asked_and_nobody_else_while_it_lives() -> None:
    states = [state(f"n{n}") for n in range(4)]
    agents = {f"n{n}": n == 2 for n in range(4)}
    (action,) = asks(versions.decide(WAITS, world([], states, agents=agents), NOW))
    assert (action.node, action.item is None) == ("n2", False)
    states[3] = asked(states[3])
    assert versions.decide(WAITS, world([], states), NOW).actions == ()


@pytest.mark.parametrize(("is_due", "node"), [(False, "n1"), (True, "n0")])
def test_a_node_that_refuses_the_request_is_asked_again_in_a_while(is_due: bool, node: str) -> None:
    seen = world([], [state("n0"), state("n1")], agents={"n0": True, "n1": not is_due})
    seen.refusals[WAITS.uid, "n0"] = Refusal("Invalid", "no", is_due=is_due)
    (action,) = asks(versions.decide(WAITS, seen, NOW))
    assert action.node == node


def test_that_the_only_agent_s_object_refuses_is_said() -> None:
    seen = world([], [state("n0"), state("n1")], agents={"n0": True, "n1": False})
    seen.refusals[WAITS.uid, "n0"] = Refusal("Invalid", "a webhook says no")
    status = versions.decide(WAITS, seen, NOW).status
    resolved = find(status.conditions, "Resolved") if status else None
    assert resolved is not None
    assert (resolved.reason, resolved.message) == (
        "WaitsForAgent",
        "what node n0 is to read cannot be written: a webhook says no",
    )


def test_sources_are_spread_over_the_agents() -> None:
    seen = world([], [state(f"n{n}") for n in range(4)])
    nodes = set()
    for number in range(20):
        (action,) = versions.decide(version(f"v{number}", ""), seen, NOW).actions
        nodes.add(action.node)
    assert len(nodes) > 2


def test_what_nobody_needs_to_read_any_more_is_taken_back() -> None:
    done = version("v", NEW)
    decision = versions.decide(done, world([], [asked(state("n0")), asked(state("n1"))]), NOW)
    assert set(decision.actions) == {
        AskResolve(node, "50", done.uid, None) for node in ("n0", "n1")
    }
