"""A way back that the spec does not know of: who begins it, where it leads, how it ends; and how
many versions stay for it.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from hotweights_crds.conditions import find
from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_operator.decide import revision, rollback
from hotweights_operator.decide.rollouts import decide
from hotweights_operator.model.actions import RolloutDecision
from hotweights_operator.model.objects import Rollout
from hotweights_operator.model.observed import Observed
from tests.operator.worlds import (
    AT_NEW,
    DONE,
    NEW,
    NOW,
    OLD,
    OTHER,
    Fields,
    after,
    asked_to_prepare,
    engine,
    gave_up,
    next_pass,
    order,
    pod,
    prepared,
    reason_of,
    rollout,
    state,
    status_of,
    told_to_change,
    version,
    world,
)

ROLLBACK: Fields = {"failurePolicy": {"action": "Rollback"}}
BACK_TO_OLD: Fields = {
    "from": "new",
    "to": {"name": "old", "version": "old", "digest": OLD},
    "by": "Command",
    "reason": "Requested",
    "message": "asked for",
    "at": "2026-01-01T11:59:30Z",
}


def serving(digest: str, count: int = 2, **more: Any) -> Observed:
    """Pods that serve a version and are told it."""
    pods = [pod(n, shows=digest) for n in range(count)]
    given = {f"p{n}": order(f"p{n}", digest, prepare="") for n in range(count)}
    return world(pods, [state("n0", [engine(n, digest) for n in range(count)], given)], **more)


def failing() -> Observed:
    """One pod of two gave the new version up; the other one has it at hand."""
    engines = [engine(0, phase="Failed", failed=gave_up()), prepared(2)[1]]
    given = {"p0": order("p0", NEW), "p1": order("p1", OLD)}
    return world([pod(0), pod(1)], [state("n0", engines, given)])


def ready(status: WeightRolloutStatus) -> str:
    found = find(status.conditions, "Ready")
    return found.status if found else ""


# -- by a command -------------------------------------------------------------------------------


def test_a_command_leads_all_pods_back_though_the_spec_names_the_bad_version() -> None:
    known = replace(rollout(DONE), command="rollback 2")
    decision = decide(known, serving(NEW), NOW)
    status = status_of(decision)
    assert (status.rolled_back.by, status.rolled_back.from_) == ("Command", "new")
    assert (status.revision, status.target.digest, status.goes_back) == (3, OLD, True)
    assert asked_to_prepare(decision, OLD) == {"p0", "p1"}
    assert [e.reason for e in decision.events if e.warning] == ["RollbackStarted"]
    # and it goes on so, pass after pass
    assert after(next_pass(known, decision), serving(NEW)).status.target.digest == OLD


def test_it_arrives_and_says_that_the_spec_is_not_served() -> None:
    known = rollout({**AT_NEW, "revision": 3, "goesBack": True, "rolledBack": BACK_TO_OLD})
    known = after(known, serving(OLD))
    status = known.status
    assert (status.phase, reason_of(status, "Stalled")) == ("RolledBack", "RolledBack")
    assert (ready(status), reason_of(status, "Reconciling")) == ("False", "")
    assert (status.stable.digest, status.history[0].outcome) == (OLD, "Complete")
    assert "spec.versionRef names new" in status.message
    # nothing is waited for: neither a deadline nor another pass
    decision = decide(known, serving(OLD), NOW + timedelta(hours=9))
    assert (status_of(decision), decision.again_in_seconds) == (status, None)


def test_a_version_can_be_named_by_what_it_is_called_or_by_its_object() -> None:
    more = version("object", OTHER)
    more = replace(more, spec=more.spec.model_copy(update={"version": "called"}))
    for name in ("object", "called"):
        known = replace(rollout(DONE), command=f"rollback@{name} 2")
        seen = serving(NEW, versions=[version("old", OLD), version("new", NEW), more])
        status = after(known, seen).status
        assert (status.target.digest, status.target.name) == (OTHER, "object")
        # it never was complete: it goes the careful way
        assert not status.goes_back


def test_it_works_though_the_weightversion_is_gone() -> None:
    known = replace(rollout(DONE), command="rollback 2")
    decision = decide(known, serving(NEW, versions=[version("new", NEW)]), NOW)
    assert status_of(decision).target.digest == OLD
    assert asked_to_prepare(decision, OLD) == {"p0", "p1"}


def test_it_ends_when_the_spec_names_another_version() -> None:
    back = {**AT_NEW, "revision": 3, "target": AT_NEW["stable"], "rolledBack": BACK_TO_OLD}
    versions = [version("old", OLD), version("new", NEW), version("other", OTHER)]
    seen = serving(OLD, versions=versions)
    status = after(rollout(back, versionRef={"name": "other"}), seen).status
    assert (status.target.digest, status.rolled_back.by, status.revision) == (OTHER, "", 4)
    # Git caught up: what is served is what is wanted
    status = after(rollout(back, versionRef={"name": "old"}), seen).status
    assert (status.phase, status.rolled_back.by, status.revision) == ("Complete", "", 3)


@pytest.mark.parametrize("how", ["retry 3", "resume 3", "restart-failed 3", "annotation"])
def test_it_ends_with_a_retry_of_what_the_spec_names(how: str) -> None:
    back = {**AT_NEW, "revision": 3, "target": AT_NEW["stable"], "rolledBack": BACK_TO_OLD}
    known = rollout(back)
    known = replace(known, retry="1") if how == "annotation" else replace(known, command=how)
    status = after(known, serving(OLD)).status
    assert (status.target.digest, status.rolled_back.by, status.revision) == (NEW, "", 4)


def test_a_retry_that_was_answered_before_ends_no_later_way_back() -> None:
    back = {**AT_NEW, "revision": 3, "target": AT_NEW["stable"], "rolledBack": BACK_TO_OLD}
    known = replace(rollout({**back, "retried": "1"}), retry="1")
    assert after(known, serving(OLD)).status.phase == "RolledBack"


# -- by the failure policy and the deadline -----------------------------------------------------


def passes(known: Rollout, *seen: Observed) -> list[RolloutDecision]:
    found = []
    for one in seen:
        found.append(decide(known, one, NOW))
        known = next_pass(known, found[-1])
    return found


def test_too_many_failures_lead_back_to_what_is_stable() -> None:
    first, second = passes(
        rollout({**AT_NEW, "preparedRevision": 2}, **ROLLBACK), failing(), failing()
    )
    status = status_of(first)
    assert (status.rolled_back.by, status.rolled_back.reason) == ("FailurePolicy", "ProbeMismatch")
    assert "p0 on n0" in status.rolled_back.message
    assert (told_to_change(first), asked_to_prepare(first)) == (set(), set())
    status = status_of(second)
    assert (status.revision, status.target.digest, status.goes_back) == (3, OLD, True)
    assert status.history[0].outcome == "RolledBack"


def test_there_is_no_way_back_without_something_behind() -> None:
    first = {**AT_NEW, "stable": {}, "previous": {}}
    status = after(rollout(first, **ROLLBACK), failing()).status
    assert (status.rolled_back.by, reason_of(status, "Paused")) == ("", "TooManyFailures")


@pytest.mark.parametrize("why", ["goes back", "led back", "complete"])
def test_two_versions_that_fail_do_not_take_turns(why: str) -> None:
    status: Fields = {
        "goes back": {**AT_NEW, "goesBack": True},
        "led back": {**AT_NEW, "rolledBack": {**BACK_TO_OLD, "from": "new"}},
        "complete": DONE,
    }[why]
    known = WeightRolloutStatus.from_dict(status)
    assert rollback.behind(known) is None
    same = rollback.automatic(rollout(status), known, "Analysis", "Slow", "too slow", NOW)
    assert same is known


def test_an_analysis_begins_one_with_its_reason() -> None:
    known = rollout(AT_NEW)
    status = rollback.automatic(known, known.status, "Analysis", "Slow", "x" * 900, NOW)
    assert (status.rolled_back.by, status.rolled_back.reason) == ("Analysis", "Slow")
    assert (len(status.rolled_back.message), status.rolled_back.to.digest) == (512, OLD)
    assert after(replace(known, status=status), serving(OLD)).status.phase == "RolledBack"


def test_a_deadline_that_passes_leads_back_only_where_that_is_asked_for() -> None:
    late = NOW + timedelta(hours=1)
    seen = serving(OLD)
    for spec, by in ((ROLLBACK, "Deadline"), ({}, "")):
        known = after(rollout(AT_NEW, **spec), seen)
        status = status_of(decide(known, seen, late))
        assert (reason_of(status, "Stalled"), status.rolled_back.by) == (
            "ProgressDeadlineExceeded",
            by,
        )


def test_a_pod_that_dies_after_the_end_leads_nobody_back() -> None:
    seen = serving(NEW)
    seen.put("pod", "p0", replace(seen.pods["p0"], ready=False))
    late = NOW + timedelta(hours=1)
    status = status_of(decide(after(rollout(DONE, **ROLLBACK), seen), seen, late))
    assert (reason_of(status, "Stalled"), status.rolled_back.by) == ("ProgressDeadlineExceeded", "")


# -- the rollback window ------------------------------------------------------------------------


def released(window: int, count: int) -> WeightRolloutStatus:
    """The status after so many versions were complete, one after the other."""
    known = rollout({}, rollbackWindow={"versions": window})
    for number in range(count):
        target = revision.describe(version(f"v{number}", f"sha256:v{number}"))
        status = revision.revised(known, target, NOW)
        known = replace(known, status=revision.completed(status, NOW, window))
    return known.status


@pytest.mark.parametrize(
    ("window", "kept"),
    [(0, ["v5"]), (1, ["v5", "v4"]), (2, ["v5", "v4", "v3"]), (3, ["v5", "v4", "v3", "v2"])],
)
def test_as_many_versions_stay_as_the_window_has(window: int, kept: list[str]) -> None:
    status = released(window, 6)
    assert [v.version for v in revision.kept(status)] == kept
    assert [v.version for v in status.earlier] == ["v4", "v3", "v2"]


@pytest.mark.parametrize(("window", "kept"), [(0, 2), (1, 2), (2, 3), (3, 4)])
def test_while_the_next_one_comes_what_is_stable_is_one_of_them(window: int, kept: int) -> None:
    known = rollout({}, rollbackWindow={"versions": window})
    known = replace(known, status=released(window, 6))
    status = revision.revised(known, revision.describe(version("next", OTHER)), NOW)
    held = revision.kept(status)
    assert [v.version for v in held[:2]] == ["next", "v5"]
    assert len(held) == kept


def test_what_was_let_go_is_not_fetched_for_the_window() -> None:
    known = rollout({}, rollbackWindow={"versions": 3})
    known = replace(known, status=released(1, 6))
    status = revision.revised(known, known.status.target, NOW)
    assert [v.version for v in revision.kept(status)] == ["v5", "v4"]


def test_a_smaller_window_lets_go_at_once() -> None:
    known = replace(rollout({}, rollbackWindow={"versions": 0}), status=released(3, 6))
    status = revision.revised(known, known.status.target, NOW)
    assert [v.version for v in revision.kept(status)] == ["v5"]


def test_any_version_of_the_window_is_a_way_back() -> None:
    known = replace(rollout({}, rollbackWindow={"versions": 3}), status=released(3, 6))
    oldest = known.status.earlier[-1]
    status = revision.revised(known, oldest, NOW)
    assert (status.goes_back, status.target.version, status.previous.version) == (True, "v2", "v5")
