"""The way back always works: whatever a new version did, setting ``versionRef`` back is enough, and
the next good version follows.

Four bad days: a version that fails its commit on one pod only; one that is refused by engines that
boot; one whose engines die five seconds after they serve it; one that is taken back in the middle
of a commit, which then fails or succeeds. After each, nothing is done but to set ``versionRef``
back: from when all pods can serve (their containers run, their engines ask) it takes at most 20 s
to Ready. All the while nobody says what is not so.

By itself this runs each of them once, with another failure policy each time;
``HOTWEIGHTS_WAY_BACK=all`` (`make e2e-way-back`) runs them under every policy. The table at the end
is in ``build/way-back.json`` too.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from e2e.cluster.conftest import PROMPT, TOKENS, WAY_BACK, answers
from e2e.harness import cold
from e2e.harness.environment import ROOT, Environment
from e2e.harness.fleet import (
    BAD,
    GOOD,
    MISFIT,
    SELECTOR,
    Fleet,
    could_serve_since,
    engines,
    is_ready,
    restarts,
)
from e2e.harness.kubectl import TimedOut, eventually
from e2e.harness.sabotage import EVERYWHERE, kill_container
from e2e.harness.tape import Body, Tape
from e2e.harness.witness import false_statements, watch_labels

BACK_SECONDS = 20.0
PATIENCE_SECONDS = 300.0  # engines start, and kubelets wait before they start them again
WORN = 3  # restarts after which the kubelet waits longer than new pods take


COLUMNS = (
    "event", "max_failed", "action",
    "phase", "reason",  # that it had reached when it was taken back
    "back_seconds",  # from when all pods could serve to Ready
    "set_to_ready_seconds",  # from setting versionRef back
    "next_seconds",  # from setting it to the next good version
    "compared",  # statements, by version, and those of statuses
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One bad day under one policy."""

    event: str
    max_failed: int
    action: str

    def __str__(self) -> str:
        return f"{self.event}-{self.max_failed}-{self.action}"


EVENTS = (
    "one-pod-fails",
    "refused-at-boot",
    "crash-loop",
    "commit-fails-meanwhile",
    "commit-succeeds-meanwhile",
)
QUICK = (
    Case("one-pod-fails", 1, "Pause"),
    Case("refused-at-boot", 0, "Abort"),
    Case("commit-fails-meanwhile", 0, "Pause"),
    Case("commit-succeeds-meanwhile", 0, "Abort"),
    Case("crash-loop", 1, "Abort"),
)
ENOUGH = 4  # answers that were held against what a pod's label says
WITNESS_SECONDS = (
    # how long it may take to get them after the last version is Ready: on a quiet machine all is
    # over in five
    60.0
)
IS_QUICK = os.environ.get("HOTWEIGHTS_WAY_BACK") != "all"
"""Not to wait for what takes minutes to be noticed."""
ALL = tuple(Case(*facts) for facts in itertools.product(EVENTS, (0, 1), ("Pause", "Abort")))


@pytest.fixture(scope="module")
def fleet(installed: Environment) -> Iterator[Fleet]:
    fleet = Fleet(installed)
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture(scope="module")
def truth() -> dict[str, list[int]]:
    """What every version answers that can be served."""
    found = {version: cold.answers(version, PROMPT, TOKENS) for version in (*GOOD, BAD)}
    assert len({tuple(answer) for answer in found.values()}) == len(found), (
        "whatever a pod served, it would pass"
    )
    return found


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", QUICK if IS_QUICK else ALL, ids=str)
def test_the_way_back(
    fleet: Fleet, truth: dict[str, list[int]], case: Case, request: pytest.FixtureRequest
) -> None:
    row: dict[str, Any] = {**dict.fromkeys(COLUMNS), **dataclasses.asdict(case)}
    request.config.stash.setdefault(WAY_BACK, []).append(row)
    _begin(fleet, case)
    with (
        fleet.tape() as tape,
        watch_labels(fleet.environment, SELECTOR, truth, PROMPT, TOKENS) as account,
    ):
        try:
            _there_and_back(fleet, tape, case, row)
            eventually(
                "the witness has seen enough",
                lambda: account.compared.total() >= ENOUGH,
                WITNESS_SECONDS,
            )
        finally:
            tape.save(ROOT / "build" / "way-back" / f"{case}.jsonl")
    compared, lies = false_statements(tape)
    row["compared"] = {**account.compared, "statuses": compared}
    now = _served(fleet)
    assert account.lies + lies == []
    assert account.compared.total() >= ENOUGH, "the witness saw too little"
    assert compared >= 8
    assert answers(fleet.environment, SELECTOR) == [truth[now]] * 2
    assert row["back_seconds"] <= BACK_SECONDS


def _begin(fleet: Fleet, case: Case) -> None:
    """Complete on a good version, under the case's policy, with pods that are not worn out."""
    fleet.sabotage.clear()
    rollout = fleet.rollout()
    worn = 1 if case.event == "crash-loop" and not IS_QUICK else WORN
    if not is_ready(rollout, rollout["metadata"]["generation"]) or _served(fleet) not in GOOD:
        fleet.renew()
    elif any(restarts(pod) >= worn for pod in fleet.kubectl.pods(SELECTOR)):
        fleet.freshen()
    # A version whose engines die after five seconds is what minReadySeconds is for: nobody else
    # changes within them.
    fleet.set_policy(
        case.max_failed, case.action, min_ready_seconds=8 if case.event == "crash-loop" else 0
    )
    fleet.until_ready()


def _there_and_back(fleet: Fleet, tape: Tape, case: Case, row: dict[str, Any]) -> None:
    old = _served(fleet)
    following = next(version for version in GOOD if version != old)
    meanwhile = BEGIN[case.event](fleet, tape, case)
    status = _rollout(tape)["status"]
    row["phase"], row["reason"] = status["phase"], _reason(status)
    began = time.monotonic()
    generation = fleet.lead_to(old)
    if meanwhile is not None:
        tape.until(
            "the way back is decided", lambda t: _observed(t) >= generation, PATIENCE_SECONDS
        )
        began = meanwhile()
    ready_at = _until_ready(tape, generation)
    row["back_seconds"] = round(ready_at - max(began, could_serve_since(tape, ready_at)), 2)
    row["set_to_ready_seconds"] = round(ready_at - began, 2)
    assert _rollout(tape)["status"]["stable"]["version"] == old
    assert _charged(tape, generation) == [], "the version gone back to has failed nowhere"
    began = time.monotonic()
    ready_at = _until_ready(tape, fleet.lead_to(following))
    row["next_seconds"] = round(ready_at - began, 2)
    status = _rollout(tape)["status"]
    assert (status["stable"]["version"], status["previous"]["version"]) == (following, old)


# -- the bad days; each ends when it is time to go back -----------------------------------------


def _one_pod_fails(fleet: Fleet, tape: Tape, case: Case) -> None:
    """The last pod fails where that ends the rollout, so that another one serves the version; else
    the first, and the other goes on.
    """
    pods = sorted(
        tape.latest("pod"), key=lambda pod: (pod["spec"]["nodeName"], pod["metadata"]["name"])
    )
    failing = pods[-1 if case.max_failed == 0 else 0]["metadata"]["name"]
    fleet.sabotage.order(fleet.digests[BAD], {failing: "mismatch"})
    generation = fleet.lead_to(BAD)
    _until_stalled(tape, generation)
    status = _rollout(tape)["status"]
    assert [failure["pod"] for failure in status["failures"]] == [failing]
    assert status["pods"]["updated"] == 1


def _refused_at_boot(fleet: Fleet, tape: Tape, case: Case) -> None:
    """Engines boot while the rollout leads to what does not fit: both where one refusal ends it,
    else one of two, or a new pod's.
    """
    if case.max_failed == 1 and case.action == "Abort":
        fleet.scale(1)
        tape.until("one pod", lambda t: len(t.latest("pod")) == 1, PATIENCE_SECONDS)
        fleet.scale(2)
        tape.until(
            "a second one on a node",
            lambda t: sum("nodeName" in p["spec"] for p in t.latest("pod")) == 2,
            60,
        )
    else:
        dying = tape.latest("pod")[case.max_failed :]
        for pod in dying:
            kill_container(fleet.environment, pod, "vllm")
        lives = {pod["metadata"]["uid"]: restarts(pod) for pod in dying}
        tape.until(
            "they are started again",
            lambda t: all(
                restarts(pod) > lives.get(pod["metadata"]["uid"], -1) for pod in t.latest("pod")
            ),
            60,
        )
    generation = fleet.lead_to(MISFIT)
    digest = fleet.digests[MISFIT]

    def refused(t: Tape) -> bool:
        words = [engine.get("failed") or {} for engine in engines(t).values()]
        return any(word.get("digest") == digest and word.get("booting") for word in words)

    tape.until("refused at boot", refused, PATIENCE_SECONDS)
    _until_stalled(tape, generation)


def _crash_loop(fleet: Fleet, tape: Tape, case: Case) -> None:
    """It dies twice (once where it is to be quick), or until it is named."""
    fleet.sabotage.order(fleet.digests[BAD], {EVERYWHERE: "die"})
    before = {pod["metadata"]["uid"]: restarts(pod) for pod in tape.latest("pod")}
    fleet.lead_to(BAD)
    wanted = 1 if IS_QUICK else 2

    def looping(t: Tape) -> bool:
        return any(
            restarts(pod) - before.get(pod["metadata"]["uid"], 0) >= wanted
            for pod in t.latest("pod")
        )

    def named(t: Tape) -> bool:
        failures = _rollout(t)["status"].get("failures", [])
        return any(failure["reason"] == "CrashLooping" for failure in failures)

    tape.until(
        "a crash loop",
        named if case.action == "Abort" and not IS_QUICK else looping,
        2 * PATIENCE_SECONDS,
    )


def _in_the_middle(fleet: Fleet, tape: Tape, ends: str) -> Any:
    """A commit that is held; what comes back lets it go on, and says when."""
    digest = fleet.digests[BAD]
    fleet.sabotage.order(digest, {EVERYWHERE: "hold"})
    fleet.lead_to(BAD)
    tape.until(
        "a commit is under way",
        lambda t: any(engine["phase"] == "Committing" for engine in engines(t).values()),
        PATIENCE_SECONDS,
    )

    def let_go() -> float:
        fleet.sabotage.order(digest, {EVERYWHERE: ends})
        return time.monotonic()

    return let_go


BEGIN: dict[str, Any] = {
    "one-pod-fails": _one_pod_fails,
    "refused-at-boot": _refused_at_boot,
    "crash-loop": _crash_loop,
    "commit-fails-meanwhile": lambda fleet, tape, case: _in_the_middle(fleet, tape, "mismatch"),
    "commit-succeeds-meanwhile": lambda fleet, tape, case: _in_the_middle(fleet, tape, ""),
}


# -- what the tape says -------------------------------------------------------------------------


def _rollout(tape: Tape) -> Body:
    return tape.latest("rollout")[0]


def _observed(tape: Tape) -> int:
    return int(_rollout(tape).get("status", {}).get("observedGeneration", 0))


def _charged(tape: Tape, generation: int) -> list[str]:
    """What was said to have failed since this generation was seen."""
    statuses = [said.body.get("status", {}) for said in tape.said if said.kind == "rollout"]
    since = [status for status in statuses if status.get("observedGeneration", 0) >= generation]
    return [
        status["message"]
        for status in since
        if status["pods"]["failed"] or status["phase"] in ("Stalled", "Aborted")
    ]


def _served(fleet: Fleet) -> str:
    return str(fleet.rollout()["status"]["target"].get("version", ""))


def _reason(status: Body) -> str:
    found = {c["type"]: c for c in status["conditions"] if c["status"] == "True"}
    return str(
        found.get("Stalled", found.get("Ready", found.get("Progressing", {}))).get("reason", "")
    )


def _until_ready(tape: Tape, generation: int) -> float:
    """When it said so; monotonic seconds."""
    try:
        tape.until("Ready", lambda t: is_ready(_rollout(t), generation), PATIENCE_SECONDS)
    except TimedOut as error:
        status = _rollout(tape)["status"]
        raise TimedOut(f"{error}; {status['phase']}: {status['message']}") from error
    return next(s.at for s in tape.said if s.kind == "rollout" and is_ready(s.body, generation))


def _until_stalled(tape: Tape, generation: int) -> None:
    def stalled(t: Tape) -> bool:
        status = _rollout(t).get("status", {})
        is_true = any(
            c["type"] == "Stalled" and c["status"] == "True" for c in status.get("conditions", [])
        )
        return is_true and status["observedGeneration"] >= generation

    tape.until("it is given up", stalled, PATIENCE_SECONDS)
