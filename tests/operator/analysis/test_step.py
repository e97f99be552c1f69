"""An analysis as a canary's step: what ends it, what its verdicts do by the failure policy, and that
nobody changes meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from hotweights_crds.analysis import WeightAnalysisTemplateSpec
from hotweights_operator.decide.rollouts import decide
from hotweights_operator.model.actions import RolloutDecision
from hotweights_operator.model.measurements import Reading
from hotweights_operator.model.objects import AnalysisTemplate, Pod, Rollout
from hotweights_operator.model.observed import Observed
from tests.operator.worlds import (
    AT_NEW,
    NEW,
    NOW,
    OLD,
    Fields,
    engine,
    gave_up,
    next_pass,
    order,
    pod,
    reason_of,
    rollout,
    state,
    status_of,
    told,
    told_to_change,
    version,
    world,
)

BEGAN = "2026-01-01T11:59:00Z"
ERRORS: Fields = {
    "name": "errors",
    "http": {"url": "http://a"},
    "successCondition": "result < 0.05",
}


def at_analysis(step: Fields | None = None, status: Fields | None = None, **spec: Any) -> Rollout:
    """A rollout whose canary has one pod, and is to be measured."""
    analysis = step if step is not None else {"metrics": [ERRORS]}
    steps = [{"setReplicas": 1}, {"analysis": analysis}]
    place = {"step": 1, "steps": 2, "stepStartedAt": BEGAN}
    full = {"strategy": {"type": "AllAtOnce", "canary": {"steps": steps}}, **spec}
    return rollout({**AT_NEW, "canary": place, **(status or {})}, **full)


def fleet(canary: Mapping[str, Any] | None = None, **more: Any) -> Observed:
    """One pod that serves the new version, and two that have it prepared."""
    pods: list[Pod] = [pod(0, shows=NEW), pod(1), pod(2)]
    engines = [engine(0, NEW, **(canary or {}))]
    engines += [engine(n, phase="Prepared", prepared=NEW) for n in (1, 2)]
    orders = {
        "p0": order("p0", NEW, prepare=""),
        **{f"p{n}": order(f"p{n}", OLD) for n in (1, 2)},
    }
    return world(pods, [state("n0", engines, orders)], **more)


def read(seen: Observed, decision: RolloutDecision, *readings: Reading) -> None:
    """What the measurements of a decision give."""
    seen.readings.clear()
    for measure, reading in zip(decision.measures, readings, strict=True):
        seen.readings[measure.id] = reading


def after_one(
    value: Any, known: Rollout | None = None
) -> tuple[RolloutDecision, Rollout, Observed]:
    """The decision that sees the first measurement."""
    known, seen = known or at_analysis(), fleet()
    first = decide(known, seen, NOW)
    read(seen, first, Reading(NOW, value) if value != "error" else Reading(NOW, error="away"))
    known = next_pass(known, first)
    return decide(known, seen, NOW), known, seen


def test_it_asks_and_waits_and_nobody_changes() -> None:
    known, seen = at_analysis(), fleet()
    first = decide(known, seen, NOW)
    (measure,) = first.measures
    assert (measure.id.metric, measure.id.number, measure.namespace) == ("errors", 1, "models")
    status = status_of(first)
    assert (status.analysis.phase, status.canary.waits_for) == ("Running", "Analysis")
    assert (status.phase, reason_of(status, "Progressing")) == ("Activating", "Analyzing")
    assert told_to_change(first) == set()
    # the same is asked for in each pass until it is answered: who measures does it once
    again = decide(next_pass(known, first), seen, NOW + timedelta(seconds=5))
    assert again.measures == first.measures
    assert again.status == first.status


def test_a_success_ends_the_step_and_all_change() -> None:
    second, known, seen = after_one(0.01)
    status = status_of(second)
    assert (status.analysis.phase, status.canary.step) == ("Successful", 2)
    assert second.measures == ()
    third = decide(next_pass(known, second), seen, NOW)
    assert told_to_change(third) == {"p1", "p2"}
    # it is remembered what was measured
    assert status_of(third).analysis.message == "errors: 0.01 (Successful)"


def test_verdicts_are_told_once() -> None:
    second, known, seen = after_one(0.01)
    assert "AnalysisSuccessful" in {event.reason for event in second.events}
    third = decide(next_pass(known, second), seen, NOW)
    assert "AnalysisSuccessful" not in {event.reason for event in third.events}
    failed, _, _ = after_one(0.07)
    assert [event.reason for event in failed.events].count("AnalysisFailed") == 1


def test_the_next_is_asked_for_when_its_time_has_come() -> None:
    metric = {**ERRORS, "count": 2, "intervalSeconds": 20}
    second, known, seen = after_one(0.01, at_analysis({"metrics": [metric]}))
    assert second.measures == ()
    assert second.again_in_seconds == 20.0
    third = decide(next_pass(known, second), seen, NOW + timedelta(seconds=20))
    assert [measure.id.number for measure in third.measures] == [2]


FAILED = ("Stalled", "AnalysisFailed", "0.07 does not satisfy result < 0.05")


def test_by_default_a_failure_holds_the_rollout_and_says_which_value_decided() -> None:
    second, known, seen = after_one(0.07)
    status = status_of(second)
    assert (status.phase, reason_of(status, "Stalled")) == FAILED[:2]
    assert FAILED[2] in status.message
    assert reason_of(status, "Paused") == "AnalysisFailed"
    for _ in range(3):
        known = next_pass(known, second)
        second = decide(known, seen, NOW + timedelta(hours=1))
        assert told_to_change(second) == set()
        assert second.measures == ()
        assert status_of(second).canary.step == 1
    # the canary serves on: only a way back takes it from there
    assert told(second).get("p0", NEW) == NEW


def test_it_stays_failed_under_a_pause_and_what_boots_gets_what_is_stable() -> None:
    second, known, _ = after_one(0.07)
    paused = replace(next_pass(known, second), spec=known.spec.model_copy(update={"paused": True}))
    boots = pod(3, shows="", ready=False, was_ready=False, gate=False)
    engines = [engine(0, NEW), engine(3, "", phase="Booting", confirmed_at="")]
    seen = world(
        [pod(0, shows=NEW), boots],
        [state("n0", engines, {"p0": order("p0", NEW, prepare="")})],
    )
    decision = decide(paused, seen, NOW)
    assert reason_of(status_of(decision), "Stalled") == "AnalysisFailed"
    assert told(decision)["p3"] == OLD


def test_with_abort_the_revision_is_given_up() -> None:
    known = at_analysis(failurePolicy={"action": "Abort"})
    second, known, seen = after_one(0.07, known)
    third = decide(next_pass(known, second), seen, NOW)
    for decision in (second, third):
        status = status_of(decision)
        assert (status.phase, reason_of(status, "Stalled")) == ("Aborted", "AnalysisFailed")
        assert FAILED[2] in status.message
        assert told_to_change(decision) == set()
    assert status_of(second).aborted_revision == 2


def test_with_rollback_all_are_led_back_by_the_analysis() -> None:
    known = at_analysis(failurePolicy={"action": "Rollback"})
    second, known, seen = after_one(0.07, known)
    back = status_of(second).rolled_back
    assert (back.by, back.reason, back.to.version) == ("Analysis", "AnalysisFailed", "old")
    assert FAILED[2] in back.message
    assert told_to_change(second) == set()
    third = decide(next_pass(known, second), seen, NOW)
    status = status_of(third)
    assert (status.revision, status.target.digest) == (3, OLD)
    assert told_to_change(third, OLD) | {"p0"} == {"p0"}
    assert third.measures == ()


def test_errors_beyond_the_limit_are_a_failure_of_another_name() -> None:
    metric = {**ERRORS, "consecutiveErrorLimit": 0}
    known = at_analysis({"metrics": [metric]}, failurePolicy={"action": "Rollback"})
    second, _, _ = after_one("error", known)
    back = status_of(second).rolled_back
    assert (back.by, back.reason) == ("Analysis", "AnalysisError")
    assert "away" in back.message


def test_what_is_inconclusive_waits_for_a_promotion() -> None:
    metric = {**ERRORS, "failureCondition": "result >= 0.1"}
    known = at_analysis({"metrics": [metric]}, failurePolicy={"action": "Rollback"})
    second, known, seen = after_one(0.07, known)
    status = status_of(second)
    assert (status.phase, status.canary.waits_for) == ("Paused", "Promotion")
    assert "0.07 satisfies neither" in status.message
    long_after = decide(next_pass(known, second), seen, NOW + timedelta(days=1))
    assert status_of(long_after).phase == "Paused"
    assert told_to_change(long_after) == set()
    promoted = replace(next_pass(known, second), command="promote 2")
    assert told_to_change(decide(promoted, seen, NOW)) == {"p1", "p2"}


@pytest.mark.parametrize("value", [None, 0.07])
def test_a_promotion_ends_an_analysis_that_runs_or_that_failed(value: float | None) -> None:
    known, seen = at_analysis(), fleet()
    decision = decide(known, seen, NOW)
    if value is not None:
        read(seen, decision, Reading(NOW, value))
        known = next_pass(known, decision)
        decision = decide(known, seen, NOW)
    promoted = replace(next_pass(known, decision), command="promote 2")
    after = decide(promoted, seen, NOW)
    assert status_of(after).last_command.outcome == "Done"
    assert after.measures == ()
    assert told_to_change(after) == {"p1", "p2"}
    assert status_of(after).rolled_back.by == ""


def test_the_progress_deadline_does_not_run_while_it_is_measured() -> None:
    known, seen = at_analysis(progressDeadlineSeconds=60), fleet()
    first = decide(known, seen, NOW)
    later = decide(next_pass(known, first), seen, NOW + timedelta(hours=2))
    assert status_of(later).phase == "Activating"


def test_a_missing_template_is_waited_for_and_the_deadline_runs() -> None:
    known = at_analysis({"templateName": "errors"}, progressDeadlineSeconds=60)
    seen = fleet()
    first = decide(known, seen, NOW)
    status = status_of(first)
    assert (status.analysis.phase, first.measures) == ("Waiting", ())
    assert "WeightAnalysisTemplate errors does not exist in namespace models: create it" in (
        status.message
    )
    known = next_pass(known, first)
    late = status_of(decide(known, seen, NOW + timedelta(seconds=120)))
    assert reason_of(late, "Stalled") == "ProgressDeadlineExceeded"
    seen.put("template", "models/errors", template())
    mended = decide(known, seen, NOW + timedelta(seconds=120))
    assert [m.metric.http.url for m in mended.measures if m.metric.http] == ["http://b/old/new/5"]


def template() -> AnalysisTemplate:
    spec = {
        "args": {"host": "b", "limit": "5"},
        "metrics": [
            {
                **ERRORS,
                "http": {
                    "url": "http://{{args.host}}/{{stable-version}}/{{canary-version}}/{{args.limit}}"
                },
            }
        ],
    }
    return AnalysisTemplate("t", "errors", "models", WeightAnalysisTemplateSpec.from_dict(spec))


def test_a_step_s_arguments_go_before_the_template_s() -> None:
    known = at_analysis({"templateName": "errors", "args": {"limit": "7"}})
    decision = decide(known, fleet(templates=[template()]), NOW)
    (measure,) = decision.measures
    assert measure.metric.http is not None
    assert measure.metric.http.url == "http://b/old/new/7"


def test_an_argument_that_nobody_gives_is_named() -> None:
    metric = {**ERRORS, "successCondition": "result < {{args.limit}}"}
    status = status_of(decide(at_analysis({"metrics": [metric]}), fleet(), NOW))
    assert status.analysis.phase == "Waiting"
    assert "metric errors: {{args.limit}} stands for nothing" in status.message
    given = at_analysis({"metrics": [metric], "args": {"limit": "much"}})
    assert "there should be a comparison" in status_of(decide(given, fleet(), NOW)).message


@pytest.mark.parametrize("held", [{"paused": True}, {"versionRef": {"name": "nowhere"}}])
def test_while_it_is_held_nothing_is_measured_and_nothing_counts(held: Fields) -> None:
    known, seen = at_analysis(), fleet()
    first = decide(known, seen, NOW)
    read(seen, first, Reading(NOW, 0.07))
    stopped = replace(next_pass(known, first), spec=at_analysis(**held).spec)
    decision = decide(stopped, seen, NOW)
    assert decision.measures == ()
    assert status_of(decision).analysis.phase == "Running"


def test_a_reading_of_another_step_or_revision_counts_for_nothing() -> None:
    known, seen = at_analysis(), fleet()
    first = decide(known, seen, NOW)
    (measure,) = first.measures
    for id_ in (
        replace(measure.id, revision=1),
        replace(measure.id, step=3),
        replace(measure.id, begun="2026-01-01T10:00:00Z"),
        replace(measure.id, number=2),
        replace(measure.id, rollout="other"),
    ):
        seen.readings[id_] = Reading(NOW, 0.07)
    assert status_of(decide(next_pass(known, first), seen, NOW)).analysis.phase == "Running"


# -- the golden probe ---------------------------------------------------------------------------

GOLDEN = {"metrics": [{"name": "golden", "goldenProbe": {}}]}


def test_golden_tokens_that_agreed_need_no_asking() -> None:
    decision = decide(at_analysis(GOLDEN), fleet({"probe": "Golden"}), NOW)
    status = status_of(decision)
    assert decision.measures == ()
    assert (status.analysis.phase, status.canary.step) == ("Successful", 2)
    assert status.analysis.metrics[0].measurements[0].value == "1"


def test_a_pod_whose_probe_differed_fails_it() -> None:
    pods = [pod(0, shows=NEW), pod(1)]
    engines = [engine(0, NEW, probe="Golden"), engine(1, phase="Failed", failed=gave_up())]
    orders = {"p0": order("p0", NEW, prepare=""), "p1": order("p1", OLD)}
    known = at_analysis(GOLDEN, failurePolicy={"maxFailed": 5})
    status = status_of(decide(known, world(pods, [state("n0", engines, orders)]), NOW))
    assert status.analysis.phase == "Failed"
    assert "1 of 2 pods that could compare golden tokens agreed" in status.message


def test_without_golden_tokens_there_is_no_data() -> None:
    metric = {"name": "golden", "goldenProbe": {}, "onNoData": "Inconclusive"}
    decision = decide(at_analysis({"metrics": [metric]}), fleet({"probe": "Ran"}), NOW)
    status = status_of(decision)
    assert status.analysis.phase == "Inconclusive"
    assert "0 of 0 pods that could compare golden tokens agreed; 1 could not" in status.message


# -- bounds -------------------------------------------------------------------------------------


def test_a_status_is_bounded_whatever_is_measured() -> None:
    metrics = [{**ERRORS, "name": f"m{n}", "count": 1000, "failureLimit": 999} for n in range(10)]
    known, seen = at_analysis({"metrics": metrics}), fleet()
    now = NOW
    for _ in range(12):
        decision = decide(known, seen, now)
        long = [Reading(now, "x" * 5000, "why" * 5000) for _ in decision.measures]
        read(seen, decision, *long)
        known = next_pass(known, decision)
        now += timedelta(seconds=61)
    analysis = known.status.analysis
    assert [len(m.measurements) for m in analysis.metrics] == [5] * 10
    assert len(str(analysis.to_dict())) < 40_000
    assert type(analysis).from_dict(analysis.to_dict()) == analysis


def test_another_version_is_measured_anew() -> None:
    second, known, _ = after_one(0.07)
    known = next_pass(known, second)
    other = version("other", "sha256:other")
    spec = known.spec.model_copy(
        update={"version_ref": known.spec.version_ref.model_copy(update={"name": "other"})}
    )
    seen = fleet(versions=[version("old", OLD), version("new", NEW), other])
    decision = decide(replace(known, spec=spec), seen, NOW)
    status = status_of(decision)
    assert (status.revision, status.canary.step, status.phase) != (2, 1, "Stalled")
    assert reason_of(status, "Stalled") == ""
