"""The invariants are worth something: each deliberate breakage of a decision is caught by the simulation.

A mutation is one line of the operator made wrong. The same stories that pass untouched must fail with it, and mostly by the name
of the invariant that it breaks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from hotweights_crds.weightrollout import VersionStatus
from hotweights_operator import (
    activation,
    budget,
    decide,
    entries,
    failures,
    model,
    nodes,
    revision,
    staging,
    summary,
    targets,
    tokens,
)
from hotweights_operator.sim.invariants import Violated
from hotweights_operator.sim.run import simulate
from hotweights_operator.summary import Hold

SEEDS = 250

Mutation = Callable[[pytest.MonkeyPatch], None]


def budget_off_by_one(patch: pytest.MonkeyPatch) -> None:
    right = budget.limit
    patch.setattr(budget, "limit", lambda strategy, desired: right(strategy, desired) + 1)


def outstanding_pods_cost_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(targets.Target, "outstanding", property(lambda self: False))


def unready_pods_cost_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(targets.Target, "unavailable", property(lambda self: self.pod.was_ready and self.outstanding))


def prepared_counts_as_updated(patch: pytest.MonkeyPatch) -> None:
    right = targets.Target.serves
    patch.setattr(targets.Target, "serves", lambda self, digest: right(self, digest) or self.prepared(digest))


def confirmed_at_is_ignored(patch: pytest.MonkeyPatch) -> None:
    def wrong(pod: Any, engine: Any, digest: str, confirmed_at: Any, phases: Any = model.SETTLED_PHASES) -> bool:
        return engine is not None and bool(digest) and engine.digest == digest and engine.phase in phases

    patch.setattr(targets, "confirmed", wrong)


def dead_agents_are_believed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.Observed, "follows", lambda self, node: node in self.states)


def writes_are_not_fenced(patch: pytest.MonkeyPatch) -> None:
    right = entries.writes

    def wrong(*arguments: Any, **options: Any) -> list[Any]:
        return [dataclasses.replace(action, resource_version="") for action in right(*arguments, **options)]

    patch.setattr(entries, "writes", wrong)


def tokens_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tokens, "following", lambda state, uid, wanted, owner: wanted.model_copy(update={"token": 1}))


def nobody_waits_for_the_others_to_prepare(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(activation, "_must_prepare", lambda target, digest, failures: False)


def unprepared_pods_change(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(targets.Target, "prepared", lambda self, digest: self.engine is not None)


def pause_is_ignored(patch: pytest.MonkeyPatch) -> None:
    right = decide._hold

    def wrong(*arguments: Any) -> Hold:
        hold = right(*arguments)
        return Hold("", "") if hold.kind == "Paused" else hold

    patch.setattr(decide, "_hold", wrong)


def abort_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = decide._hold

    def wrong(*arguments: Any) -> Hold:
        hold = right(*arguments)
        return Hold("", "") if hold.kind == "Aborted" else hold

    patch.setattr(decide, "_hold", wrong)


def new_pods_get_what_was_given_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(revision, "last_complete", lambda status: status.target)


def failures_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    right = failures.find

    def wrong(*arguments: Any) -> failures.Failures:
        found = right(*arguments)
        return failures.Failures({}, {**found.failed, **found.missing})

    patch.setattr(failures, "find", wrong)


def the_previous_version_is_let_go(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(revision, "_previous", lambda status, target: VersionStatus())


def deadlines_never_pass(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(summary, "deadline_runs", lambda hold: False)


def orphans_forget(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nodes, "_kept_digest", lambda pod, state, observed: "")


def entries_are_dropped_too_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(entries, "taken_over", lambda state, pod, uid: True)


def nothing_is_ever_staged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(staging, "describe", lambda rollout, digest, observed: None)


MUTATIONS: dict[Mutation, str] = {
    budget_off_by_one: "within budget",
    outstanding_pods_cost_nothing: "within budget",
    unready_pods_cost_nothing: "within budget",
    prepared_counts_as_updated: "zero false commits",
    confirmed_at_is_ignored: "zero false commits",
    dead_agents_are_believed: "zero false commits",
    writes_are_not_fenced: "",
    tokens_stay: "tokens grow",
    nobody_waits_for_the_others_to_prepare: "all prepare first",
    unprepared_pods_change: "",
    pause_is_ignored: "holds still",
    abort_is_forgotten: "",
    new_pods_get_what_was_given_up: "holds still",
    failures_are_not_counted: "",
    the_previous_version_is_let_go: "the previous version stays staged",
    deadlines_never_pass: "",
    orphans_forget: "orphans keep what they serve",
    entries_are_dropped_too_early: "",
    nothing_is_ever_staged: "",
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_it_is_caught(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch)
    with pytest.raises(Violated) as caught:
        _tell_stories()
    assert MUTATIONS[mutation] in ("", caught.value.name)


def _tell_stories() -> None:
    for seed in range(SEEDS):
        simulate(seed)
