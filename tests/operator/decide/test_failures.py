"""Which pods have failed a version, which are only missing, and which revision it is that begins
and ends.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hotweights_crds.conditions import find, is_true
from hotweights_crds.nodeweights import (
    MAX_PODS,
    EngineStatus,
    GivenUp,
    PodAssignment,
    StagedVersion,
)
from hotweights_crds.weightrollout import MAX_HISTORY
from hotweights_crds.weightversion import WeightVersionStatus
from hotweights_operator.decide import revision
from hotweights_operator.decide.rollouts import conflicts, decide
from hotweights_operator.model.objects import Node, Rollout
from hotweights_operator.model.observed import Observed
from tests.operator.worlds import (
    AT_NEW,
    LENIENT,
    NEW,
    NOW,
    OLD,
    OTHER,
    Fields,
    asked_to_prepare,
    engine,
    gave_up,
    looping,
    order,
    orders,
    pod,
    prepared,
    rollout,
    state,
    status_after,
    told_to_change,
    version,
    world,
)


def reasons(known: Rollout, seen: Observed) -> list[tuple[str, str]]:
    """Pods that are named, and why."""
    return [(failure.pod, failure.reason) for failure in status_after(known, seen).failures]


def remembered(reason: str = "ProbeMismatch") -> Fields:
    """A status that says that p0 does not follow."""
    return {**AT_NEW, "failures": [{"pod": "p0", "podUID": "p0", "reason": reason}]}


# -- what speaks against a version --------------------------------------------------------------


@pytest.mark.parametrize(
    ("restarts", "given"),
    [
        (1, order("p0", NEW, prepare="")),
        (2, order("p0", NEW, prepare="")),
        (3, order("p0", OLD, prepare="")),
        (3, order("p0", NEW, prepare="", revision=1)),
        (2, order("p0", OLD, prepare=OTHER, revision=1)),
        (1, order("p0", OLD)),
        (3, order("p0", NEW, prepare="", restarts=3)),
    ],
    ids=[
        "once",
        "twice",
        "on what it serves",
        "of an earlier order",
        "preparing another",
        "once while it prepares",
        "before it was told",
    ],
)
def test_ends_that_say_nothing_against_the_version(restarts: int, given: Any) -> None:
    seen = world(
        [looping(0, restarts)], [state("n0", [engine(0, "", phase="Booting")], {"p0": given})]
    )
    assert status_after(rollout(AT_NEW), seen).pods.failed == 0


@pytest.mark.parametrize(
    ("serves", "gave"),
    [(OLD, gave_up(OLD)), (NEW, gave_up())],
    ids=["of another version", "and took it then"],
)
def test_refusals_that_say_nothing_against_the_version(serves: str, gave: GivenUp) -> None:
    seen = world(
        [pod(0, shows=serves)], [state("n0", [engine(0, serves, failed=gave)], {"p0": serves})]
    )
    assert status_after(rollout(AT_NEW), seen).pods.failed == 0


@pytest.mark.parametrize(
    ("engines", "given"),
    [
        ([engine(0, failed=gave_up(rollout="made-before"))], order("p0", OLD)),
        ([engine(0, "", phase="Booting")], order("p0", NEW, prepare="", rollout="made-before")),
    ],
    ids=["gave up", "loops"],
)
def test_what_failed_in_another_rollout_s_revision_of_the_same_number_is_no_failure_of_this_one(
    engines: list[EngineStatus], given: PodAssignment
) -> None:
    shown = pod(0) if engines[0].digest else looping(0, 4)
    seen = world([shown], [state("n0", engines, {"p0": given})])
    assert status_after(rollout(AT_NEW), seen).pods.failed == 0
    own = [
        e.model_copy(update={"failed": e.failed.model_copy(update={"rollout": "r"})})
        if e.failed
        else e
        for e in engines
    ]
    seen = world([shown], [state("n0", own, {"p0": given.model_copy(update={"rollout": "r"})})])
    assert status_after(rollout(AT_NEW), seen).pods.failed == 1


def test_what_an_engine_gave_up_stays_so_when_its_agent_is_gone() -> None:
    seen = world(
        [pod(0)], [state("n0", [engine(0, failed=gave_up())], {"p0": OLD})], agents={"n0": False}
    )
    assert reasons(rollout(AT_NEW, **LENIENT), seen) == [("p0", "ProbeMismatch")]


def test_an_agent_that_was_away_is_no_failure_of_the_version() -> None:
    seen = world([pod(0)], [state("n0", prepared(1), {"p0": OLD})])
    assert reasons(rollout(remembered("AgentMissing")), seen) == []


def test_a_pod_that_serves_the_version_at_last_or_goes_has_not_failed_it() -> None:
    for known, serves in ((pod(0, shows=NEW), NEW), (pod(0, terminating=True), OLD)):
        seen = world(
            [known, pod(1)],
            [state("n0", [engine(0, serves), engine(1)], {"p0": serves, "p1": OLD})],
        )
        assert status_after(rollout(remembered(), **LENIENT), seen).pods.failed == 0


def test_a_pod_that_failed_and_is_away_now_is_named_once() -> None:
    seen = world([pod(0)], [state("n0", [engine(0)], {"p0": OLD})], agents={"n0": False})
    assert reasons(rollout(remembered(), **LENIENT), seen) == [("p0", "ProbeMismatch")]


def test_staging_that_succeeds_at_last_is_not_held_against_the_node_s_pods() -> None:
    staged = [
        StagedVersion(digest=OLD, phase="Staged"),
        StagedVersion(digest=NEW, phase="Failed", reason="Timeout"),
    ]
    idle = {"p0": order("p0", OLD, prepare="")}
    known = rollout(AT_NEW, **LENIENT)
    first = status_after(known, world([pod(0)], [state("n0", [engine(0)], idle, staged=staged)]))
    assert (first.pods.failed, first.failures[0].reason) == (1, "Timeout")
    seen = world([pod(0)], [state("n0", [engine(0)], idle)])
    assert status_after(replace(known, status=first), seen).pods.failed == 0


# -- who is missing -----------------------------------------------------------------------------


@pytest.mark.parametrize("node", [Node("n0", "u", ready=False), None])
def test_a_node_that_is_not_there_is_named(node: Node | None) -> None:
    seen = world(
        [pod(0)], [state("n0", [engine(0)], {"p0": OLD})], nodes={"n0": node} if node else {}
    )
    assert reasons(rollout(AT_NEW), seen) == [("p0", "NodeNotReady")]


def test_a_pod_without_a_node_is_named() -> None:
    assert reasons(rollout(AT_NEW), world([pod(0, "")], [])) == [("p0", "NotScheduled")]


def test_pods_beyond_the_room_of_an_object_are_named_and_push_nobody_out() -> None:
    numbers = range(100, 100 + MAX_PODS)
    given = {f"p{n}": order(f"p{n}", OLD, prepare="", revision=1) for n in numbers}
    pods = [pod(0), *(pod(n) for n in numbers)]
    engines = [engine(0), *(engine(n) for n in numbers[1:])]  # as many as an object may name
    decision = decide(rollout(AT_NEW), world(pods, [state("n0", engines, given)]), NOW)
    assert set(orders(decision)) == set(given)
    assert decision.status is not None
    assert ("p0", "TooManyPods") in [(f.pod, f.reason) for f in decision.status.failures]


def test_a_pod_in_the_middle_of_a_switch_has_no_trouble_with_its_clock() -> None:
    later = NOW.replace(hour=11, minute=30)
    about_to = engine(0, OLD, phase="Prepared", prepared=NEW)
    seen = world(
        [pod(0, gate=False, engine_started_at=later)], [state("n0", [about_to], {"p0": NEW})]
    )
    assert reasons(rollout(AT_NEW), seen) == []


# -- holds --------------------------------------------------------------------------------------

SERVED = world([pod(0, shows=NEW)], [state("n0", [engine(0, NEW)], {"p0": NEW})])


def test_a_pause_takes_nothing_from_what_is_complete() -> None:
    status = status_after(rollout(AT_NEW, paused=True), SERVED)
    assert (status.phase, is_true(status.conditions, "Ready")) == ("Complete", True)


@pytest.mark.parametrize(
    ("known", "seen", "phase"),
    [
        (rollout({**AT_NEW, "abortedRevision": 2}), SERVED, "Aborted"),
        (rollout(AT_NEW, versionRef={"name": "none"}), SERVED, "Pending"),
        (replace(rollout(AT_NEW), terminating=True), SERVED, "Pending"),
    ],
    ids=["aborted", "no version", "being deleted"],
)
def test_what_holds_for_good_is_not_ready_whatever_pods_serve(
    known: Rollout, seen: Observed, phase: str
) -> None:
    status = status_after(known, seen)
    assert (status.phase, is_true(status.conditions, "Ready")) == (phase, False)


def test_an_abort_is_of_its_own_revision() -> None:
    seen = world([pod(0)], [state("n0", prepared(1), {"p0": OLD})])
    assert told_to_change(decide(rollout({**AT_NEW, "abortedRevision": 1}), seen, NOW)) == {"p0"}


def unusable(reason: str, digest: str = "") -> Any:
    """A version that is not resolved."""
    condition = {
        "type": "Resolved",
        "status": "False",
        "reason": reason,
        "message": "m",
        "lastTransitionTime": "x",
    }
    status = WeightVersionStatus.from_dict({"digest": digest, "conditions": [condition]})
    return replace(version("new", ""), status=status)


@pytest.mark.parametrize(
    ("reason", "phase", "stalled"),
    [("ChecksumMismatch", "Stalled", True), ("Resolving", "Resolving", False)],
)
def test_a_version_that_somebody_has_to_mend_stalls(reason: str, phase: str, stalled: bool) -> None:
    seen = world([pod(0)], [state("n0", [engine(0)], {"p0": OLD})], versions=[unusable(reason)])
    status = status_after(rollout(AT_NEW), seen)
    assert (status.phase, is_true(status.conditions, "Stalled")) == (phase, stalled)


def test_a_version_with_another_digest_than_is_pinned_is_not_rolled_out() -> None:
    seen = world(
        [pod(0)],
        [state("n0", [engine(0)], {"p0": OLD})],
        versions=[unusable("DigestMismatch", OTHER)],
    )
    status = status_after(rollout(AT_NEW), seen)
    assert (status.revision, status.target.digest, status.phase) == (2, NEW, "Stalled")


def test_a_rollout_that_is_being_deleted_begins_nothing() -> None:
    seen = world(
        [pod(0)], [state("n0", [engine(0)], {"p0": order("p0", OLD, prepare="")}, listed=(OLD,))]
    )
    going = replace(rollout(AT_NEW), terminating=True)
    seen.put("rollout", "", going)
    assert decide(going, seen, NOW).actions == ()
    going = replace(rollout(AT_NEW, versionRef={"name": "old"}), terminating=True)
    assert status_after(going, SERVED).revision == 2


def shared(**more: Any) -> tuple[Rollout, Rollout, Observed]:
    """An older and a younger rollout that select the same pod, and the younger one's own."""
    older = replace(rollout(AT_NEW), uid="older", name="older", created_at="2025")
    younger = rollout(
        AT_NEW, target={"selector": {"matchExpressions": [{"key": "app", "operator": "Exists"}]}}
    )
    own = pod(1)
    own = replace(own, labels={**own.labels, "app": "another"})
    known = state("n0", prepared(2), {"p1": OLD})
    return older, younger, world([pod(0, **more), own], [known], rollouts=[older, younger])


def test_the_younger_of_two_holds_still_and_the_older_goes_on() -> None:
    older, younger, seen = shared()
    assert [pod.name for pod, _ in conflicts(younger, seen)] == ["p0"]
    decision = decide(younger, seen, NOW)
    assert told_to_change(decision) == set()
    assert status_after(younger, seen).phase == "Stalled"
    assert not is_true(status_after(older, seen).conditions, "Stalled")


def test_a_rollout_in_conflict_is_not_ready_though_its_own_pods_serve() -> None:
    _, younger, _ = shared()
    older = replace(rollout(AT_NEW), uid="older", name="older", created_at="2025")
    own = replace(pod(1, shows=NEW), labels={**pod(1, shows=NEW).labels, "app": "another"})
    seen = world(
        [pod(0), own],
        [state("n0", [engine(0), engine(1, NEW)], {"p1": NEW})],
        rollouts=[older, younger],
    )
    assert not is_true(status_after(younger, seen).conditions, "Ready")


def test_a_contested_pod_that_goes_is_no_conflict_any_more() -> None:
    _, younger, seen = shared(terminating=True)
    assert conflicts(younger, seen) == []


def test_neighbours_with_pods_of_their_own_are_no_conflict() -> None:
    older = replace(rollout(AT_NEW), uid="older", name="older", created_at="2025")
    younger = rollout(AT_NEW, target={"selector": {"matchLabels": {"app": "another"}}})
    assert conflicts(younger, world([pod(0)], [], rollouts=[older, younger])) == []


# -- revisions ----------------------------------------------------------------------------------


def test_a_new_revision_owes_nothing_to_the_one_before() -> None:
    before = {**remembered(), "mostFailed": 1, "highWater": {"updated": 5}, "abortedRevision": 2}
    known = rollout(before, versionRef={"name": "other"})
    status = revision.revised(known, version("other", OTHER), NOW)
    assert (status.failures, status.most_failed, status.high_water.updated) == ([], 0, 0)
    assert (status.history[0].revision, status.history[0].outcome) == (2, "Aborted")
    idle = {"p0": order("p0", OLD, prepare="")}
    seen = world([pod(0)], [state("n0", [engine(0)], idle)], versions=[version("other", OTHER)])
    assert asked_to_prepare(decide(known, seen, NOW), OTHER) == {"p0"}


def test_what_was_never_complete_is_neither_previous_nor_held() -> None:
    status = revision.revised(rollout(AT_NEW), version("other", OTHER), NOW)
    assert (status.previous.digest, [known.digest for known in revision.kept(status)]) == (
        OLD,
        [OTHER, OLD],
    )


def test_an_end_is_entered_once_also_for_a_status_of_an_earlier_release() -> None:
    ended = {"revision": 2, "version": "new", "outcome": "Complete"}
    before = {key: value for key, value in AT_NEW.items() if key != "stable"}
    status = revision.completed(rollout({**before, "history": [ended]}).status, NOW)
    assert (len(status.history), status.stable.digest) == (1, NEW)


def test_the_history_has_an_end() -> None:
    long = [{"revision": n, "version": "v", "outcome": "Superseded"} for n in range(MAX_HISTORY)]
    status = revision.revised(rollout({**AT_NEW, "history": long}), version("other", OTHER), NOW)
    assert (len(status.history), status.history[0].revision) == (MAX_HISTORY, 2)


def test_a_version_that_is_waited_for_in_vain_is_named() -> None:
    seen = world([pod(0)], [state("n0", [engine(0)], {"p0": OLD})], versions=[version("new", "")])
    known = rollout(AT_NEW)
    known = replace(known, status=status_after(known, seen))
    decision = decide(known, seen, NOW.replace(hour=13))
    assert decision.status is not None
    stalled = find(decision.status.conditions, "Stalled")
    assert stalled is not None
    assert stalled.reason == "ProgressDeadlineExceeded"
