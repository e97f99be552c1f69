"""Who is told to take a version only with golden tokens, what becomes of a rollout where there are
none, and what a status says of who proved what.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hotweights_crds.nodeweights import EngineStatus
from hotweights_operator.decide.rollouts import decide
from hotweights_operator.model.objects import Rollout
from tests.operator.worlds import (
    AT_NEW,
    BACK,
    DONE,
    NEW,
    NOW,
    OLD,
    Fields,
    asked_to_prepare,
    engine,
    gave_up,
    order,
    orders,
    pod,
    prepared,
    reason_of,
    rollout,
    served,
    state,
    status_after,
    told_to_change,
    world,
)

KIND = "vllm 0.32.0 cpu float32"
GOLDEN: Fields = {"activation": {"probe": "Golden"}}
PASSED: Fields = {**AT_NEW, "preparedRevision": 2}


def demands(known: Rollout, given: dict[str, Any], *engines: EngineStatus) -> dict[str, str]:
    """By pod, the version that it is to take only with golden tokens."""
    seen = world([pod(n) for n in range(len(engines))], [state("n0", engines, given)])
    return {uid: given.golden for uid, given in orders(decide(known, seen, NOW)).items()}


def test_a_pod_that_prepares_the_target_is_told_so_and_its_token_stays() -> None:
    seen = world([pod(0)], [state("n0", [engine(0, kind=KIND)], {"p0": order("p0", OLD)})])
    given = orders(decide(rollout(AT_NEW, **GOLDEN), seen, NOW))["p0"]
    assert (given.digest, given.prepare, given.golden, given.token) == (OLD, NEW, NEW, 1)


def test_a_pod_that_changes_to_it_is_told_so() -> None:
    found = demands(rollout(PASSED, **GOLDEN), {"p0": OLD}, *prepared(1, kind=KIND))
    assert found == {"p0": NEW}


@pytest.mark.parametrize(
    ("known", "given"),
    [
        (rollout(AT_NEW), order("p0", OLD, prepare="")),
        (rollout(BACK, versionRef={"name": "old"}, **GOLDEN), order("p0", NEW, prepare="")),
        (rollout(DONE, **GOLDEN), order("p0", OLD, prepare="")),
    ],
    ids=["not demanded", "on the way back", "complete before"],
)
def test_what_needs_no_golden_tokens(known: Rollout, given: Any) -> None:
    serves = prepared(1, NEW, kind=KIND) if known.status.target.digest == NEW else None
    engines = serves or [engine(0, NEW, phase="Prepared", prepared=OLD, kind=KIND)]
    found = demands(known, {"p0": given}, *engines)
    assert found == {"p0": ""}


def test_a_pod_that_is_told_nothing_of_the_target_needs_none() -> None:
    """It keeps what it serves: an agent that is told of no version has nothing to ask."""
    engines = [engine(0, kind=KIND, phase="Preparing"), engine(1, kind=KIND)]
    given = {"p0": order("p0", OLD), "p1": order("p1", OLD, prepare="")}
    assert demands(rollout(AT_NEW, **GOLDEN), given, *engines) == {"p0": NEW, "p1": ""}


# -- where there are none -----------------------------------------------------------------------


REFUSED = gave_up(
    step="Prepare", reason="NoGoldenTokens", message="the version has no golden tokens"
)


@pytest.mark.parametrize(
    ("action", "phase"), [("Pause", "Stalled"), ("Abort", "Aborted")], ids=["Pause", "Abort"]
)
def test_one_pod_that_cannot_be_proved_holds_the_others_before_any_has_changed(
    action: str, phase: str
) -> None:
    engines = [engine(0, phase="Failed", failed=REFUSED, kind=KIND), *prepared(3, kind=KIND)[1:]]
    seen = world(
        [pod(n) for n in range(3)], [state("n0", engines, dict.fromkeys(["p0", "p1", "p2"], OLD))]
    )
    known = rollout(AT_NEW, **GOLDEN, failurePolicy={"maxFailed": 0, "action": action})
    decision = decide(known, seen, NOW)
    assert told_to_change(decision) == set()
    status = status_after(known, seen)
    assert (status.phase, reason_of(status, "Stalled")) == (phase, "NoGoldenTokens")
    assert "no golden tokens" in status.message


def test_an_agent_too_old_to_ask_is_named_and_its_pods_wait() -> None:
    """Otherwise it would commit what nobody can prove: it does not know the field."""
    pods, given = [pod(0), pod(1, "n1")], order("p0", OLD, prepare="")
    old = state("n0", [engine(0)], {"p0": given})
    new = state("n1", [engine(1, kind=KIND)], {"p1": order("p1", OLD, prepare="")})
    old = replace(old, status=old.status.model_copy(update={"agent_version": "0.1.0"}))
    seen = world(pods, [old, new])
    known = rollout(AT_NEW, **GOLDEN)
    status = status_after(known, seen)
    assert [(f.pod, f.reason) for f in status.failures] == [("p0", "AgentTooOld")]
    assert "0.1.0" in status.failures[0].message
    assert status.pods.failed == 0
    decision = decide(known, seen, NOW)
    assert (asked_to_prepare(decision), told_to_change(decision)) == ({"p1"}, set())
    # without the demand it is asked as ever
    assert [f.reason for f in status_after(rollout(AT_NEW), seen).failures] == []


@pytest.mark.parametrize("phase", ["Booting", "Disconnected"])
def test_an_engine_that_has_not_said_its_kind_yet_says_nothing_of_its_agent(phase: str) -> None:
    seen = world([pod(0)], [state("n0", [engine(0, phase=phase)], {"p0": OLD})])
    reasons = [f.reason for f in status_after(rollout(AT_NEW, **GOLDEN), seen).failures]
    assert "AgentTooOld" not in reasons


# -- who proved what ----------------------------------------------------------------------------


def test_pods_are_counted_by_what_proved_them() -> None:
    words = ("Golden", "Golden", "Ran", "None", "")
    seen = served(*(engine(n, NEW, probe=word) for n, word in enumerate(words)))
    pods = status_after(rollout(AT_NEW), seen).pods
    assert (pods.updated, pods.golden, pods.ran) == (5, 2, 1)


def test_what_serves_another_version_or_proves_nothing_counts_nowhere() -> None:
    seen = world(
        [pod(0), pod(1, shows=NEW)],
        [
            state(
                "n0",
                [engine(0, probe="Golden"), engine(1, NEW, probe="Golden", confirmed_at="")],
                {"p0": OLD, "p1": NEW},
            )
        ],
    )
    pods = status_after(rollout(AT_NEW), seen).pods
    assert (pods.updated, pods.golden, pods.ran) == (0, 0, 0)
