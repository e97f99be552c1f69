"""The annotation hotweights.dev/command: what each verb does, once, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hotweights_crds.weightrollout import CommandStatus, WeightRolloutStatus
from hotweights_operator.decide.rollouts import decide
from hotweights_operator.model.commands import NotACommand, parse
from hotweights_operator.model.objects import Rollout
from hotweights_operator.model.observed import Observed
from tests.operator.worlds import (
    AT_NEW,
    DONE,
    NEW,
    NOW,
    OLD,
    Fields,
    after,
    asked_to_prepare,
    engine,
    order,
    pod,
    reason_of,
    rollout,
    state,
    status_of,
    told_to_change,
    version,
    world,
)

CANARY: Fields = {
    "strategy": {"type": "AllAtOnce", "canary": {"steps": [{"setReplicas": 1}, {"pause": {}}]}}
}
PAUSED: Fields = {
    **AT_NEW,
    "canary": {"step": 1, "steps": 2, "stepStartedAt": "2026-01-01T11:59:00Z"},
}


def fleet(**more: Any) -> Observed:
    """Three pods that serve the old version, one of them has the new one at hand."""
    engines = [engine(0, phase="Prepared", prepared=NEW), engine(1), engine(2)]
    given = {"p0": order("p0", OLD), **{f"p{n}": order(f"p{n}", OLD, prepare="") for n in (1, 2)}}
    return world([pod(n) for n in range(3)], [state("n0", engines, given)], **more)


def commanded(text: str, status: Fields | None = None, **spec: Any) -> Rollout:
    return replace(rollout(AT_NEW if status is None else status, **spec), command=text)


def answer(known: Rollout, seen: Observed | None = None) -> CommandStatus:
    return after(known, seen or fleet()).status.last_command


def done(text: str, status: Fields | None = None, **spec: Any) -> WeightRolloutStatus:
    found = after(commanded(text, status, **spec), fleet()).status
    assert (found.last_command.outcome, found.last_command.text) == ("Done", text)
    return found


# -- the text -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "verb", "argument", "revision"),
    [
        ("pause 2", "pause", "", 2),
        ("promote-full 17", "promote-full", "", 17),
        ("promote 3 second", "promote", "", 3),
        ("rollback 3", "rollback", "", 3),
        ("rollback@v1.2_a-b 3 x", "rollback", "v1.2_a-b", 3),
    ],
)
def test_a_command_is_read(text: str, verb: str, argument: str, revision: int) -> None:
    found = parse(text)
    assert (found.verb, found.argument, found.revision) == (verb, argument, revision)


@pytest.mark.parametrize(
    "text",
    ["pause", "pause two", "3 pause", "explode 3", "pause@v1 3", "rollback@ 3", "pause 3 a b", "-"],
)
def test_what_is_none_says_what_to_write(text: str) -> None:
    with pytest.raises(NotACommand, match="write VERB REVISION"):
        parse(text)
    found = answer(commanded(text))
    assert (found.text, found.outcome, found.at) == (text, "Refused", "2026-01-01T12:00:00Z")
    assert "write VERB REVISION" in found.message


def test_a_command_for_another_revision_says_which_is_current() -> None:
    known = after(commanded("abort 1"), fleet())
    assert (known.status.last_command.outcome, known.status.aborted_revision) == ("Refused", 0)
    assert known.status.last_command.message == (
        "revision 2 is current, to new: abort was for revision 1"
    )


# -- once ---------------------------------------------------------------------------------------


def test_the_same_text_is_acted_on_once() -> None:
    known = after(commanded("pause 2"), fleet())
    resumed = replace(known, command="resume 2")
    known = after(resumed, fleet())
    assert known.status.paused_by == ""
    assert after(known, fleet()).status.last_command == known.status.last_command
    # another ID is another command
    assert after(replace(known, command="pause 2 again"), fleet()).status.paused_by == "Command"


def test_an_answer_is_told_once_and_a_refusal_warns() -> None:
    def told(known: Rollout) -> list[tuple[str, bool]]:
        events = decide(known, fleet(), NOW).events
        return [(e.reason, e.warning) for e in events if e.reason.startswith("Command")]

    assert told(commanded("pause 2")) == [("CommandDone", False)]
    assert told(commanded("pause 9")) == [("CommandRefused", True)]
    assert told(after(commanded("pause 2"), fleet())) == []


def test_what_is_being_deleted_obeys_nobody() -> None:
    assert answer(replace(commanded("abort 2"), terminating=True)).text == ""


# -- pause, resume ------------------------------------------------------------------------------


def test_a_pause_holds_like_the_spec_and_is_not_in_the_spec() -> None:
    decision = decide(commanded("pause 2"), fleet(), NOW)
    status = status_of(decision)
    assert (status.paused_by, status.phase, reason_of(status, "Paused")) == (
        "Command",
        "Paused",
        "Requested",
    )
    assert (told_to_change(decision), asked_to_prepare(decision)) == (set(), set())
    assert "by a command" in status.message


def test_a_resume_lets_it_go_on() -> None:
    paused = {**AT_NEW, "pausedBy": "Command", "preparedRevision": 2}
    decision = decide(commanded("resume 2", paused), fleet(), NOW)
    assert told_to_change(decision) == {"p0"}


def test_a_pause_ends_with_its_revision() -> None:
    other = rollout({**AT_NEW, "pausedBy": "Command"}, versionRef={"name": "old"})
    status = after(other, fleet()).status
    assert (status.revision, status.paused_by) == (3, "")


def test_a_resume_without_a_pause_says_what_would_help() -> None:
    assert "spec.paused is true" in answer(commanded("resume 2", paused=True)).message
    assert (
        "promote ends a canary's pause" in answer(commanded("resume 2", PAUSED, **CANARY)).message
    )
    both = answer(commanded("resume 2", {**AT_NEW, "pausedBy": "Command"}, paused=True))
    assert (both.outcome, both.message) == ("Done", "resumed; spec.paused still holds it")


# -- promote ------------------------------------------------------------------------------------


def test_a_promotion_ends_the_pause() -> None:
    status = done("promote 2", PAUSED, **CANARY)
    assert (status.canary.step, status.phase) == (2, "Activating")


def test_a_promotion_ends_nothing_but_a_pause() -> None:
    found = answer(commanded("promote 2", {**PAUSED, "canary": {"steps": 2}}, **CANARY))
    assert (found.outcome, "promote-full skips" in found.message) == ("Refused", True)
    assert answer(commanded("promote 2")).outcome == "Refused"
    assert answer(commanded("promote-full 2")).outcome == "Refused"


def test_a_full_promotion_skips_all_steps_but_not_what_makes_them_safe() -> None:
    at_first = {**PAUSED, "canary": {"step": 0, "steps": 2}, "preparedRevision": 2}
    decision = decide(commanded("promote-full 2", at_first, **CANARY), fleet(), NOW)
    status = status_of(decision)
    assert (status.canary.step, status.canary.allowed) == (2, 3)
    # all prepare before the first of them changes
    assert (asked_to_prepare(decision), told_to_change(decision)) == ({"p0", "p1", "p2"}, set())


def test_a_promotion_of_what_is_complete_or_given_up_is_refused() -> None:
    for status in (DONE, {**AT_NEW, "abortedRevision": 2}):
        for verb in ("promote", "promote-full", "pause", "abort"):
            assert answer(commanded(f"{verb} 2", status, **CANARY)).outcome == "Refused"


# -- abort, retry -------------------------------------------------------------------------------


def test_an_abort_gives_the_revision_up() -> None:
    decision = decide(commanded("abort 2", {**AT_NEW, "preparedRevision": 2}), fleet(), NOW)
    status = status_of(decision)
    assert (status.phase, status.aborted_revision) == ("Aborted", 2)
    assert reason_of(status, "Stalled") == "Requested"
    assert (told_to_change(decision), asked_to_prepare(decision)) == (set(), set())


@pytest.mark.parametrize("verb", ["retry", "restart-failed"])
def test_a_retry_is_a_revision_of_its_own(verb: str) -> None:
    status = done(f"{verb} 2", {**AT_NEW, "abortedRevision": 2})
    assert (status.revision, status.target.digest, status.aborted_revision) == (3, NEW, 2)
    assert status.phase == "Activating"


def test_what_is_complete_or_not_resolved_is_not_tried_again() -> None:
    assert "is complete" in answer(commanded("retry 2", DONE)).message
    unknown = fleet(versions=[version("old", OLD), version("new", "")])
    assert "is not resolved" in answer(commanded("retry 2"), unknown).message


# -- rollback: what it refuses (what it does is in test_rollback) --------------------------------


def test_a_rollback_needs_a_version_that_is_there_and_another_one() -> None:
    def refused(text: str, status: Fields = AT_NEW, **spec: Any) -> str:
        versions = [version("old", OLD), version("new", NEW), version("raw", "")]
        twins = [version(name, f"sha256:{name}") for name in ("twin-a", "twin-b")]
        twins = [replace(v, spec=v.spec.model_copy(update={"version": "twin"})) for v in twins]
        found = answer(commanded(text, status, **spec), fleet(versions=[*versions, *twins]))
        assert found.outcome == "Refused"
        return found.message

    assert "nothing was complete before" in refused("rollback 2", {**AT_NEW, "previous": {}})
    assert "leads to new already" in refused("rollback@new 2")
    assert "no WeightVersion of namespace models" in refused("rollback@nowhere 2")
    assert "raw is not resolved" in refused("rollback@raw 2")
    assert "name one of twin-a, twin-b" in refused("rollback@twin 2")
    assert "which no revision has begun" in refused("rollback 2", versionRef={"name": "later"})
