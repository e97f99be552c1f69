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
    words,
)
from e2e.harness.kubectl import TimedOut, eventually
from e2e.harness.sabotage import EVERYWHERE, kill_container
from e2e.harness.tape import Body, Tape
from e2e.harness.witness import Account, Statements, judge, watch_labels

BACK_SECONDS = 20.0
PATIENCE_SECONDS = 900.0  # engines start, and kubelets wait before they start them again
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
ENOUGH = 4  # answers that were held against what a pod's label says, and words of two pods once
WITNESS_SECONDS = (
    # how long it may take to get them after the last version is Ready: on a quiet machine all is
    # over in five
    180.0
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


@pytest.mark.timeout(3600)
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
            old, following = _there_and_back(fleet, tape, truth, case, row)
            _seen_enough(account, following)
        finally:
            tape.save(ROOT / "build" / "way-back" / f"{case}.jsonl")
    statements = judge(tape)
    compared = statements.named.total() + statements.served.total()
    row["compared"] = {**account.compared, "statuses": compared}
    _nobody_lied(account, statements, old, following)
    assert answers(fleet.environment, SELECTOR) == [truth[following]] * 2
    assert row["back_seconds"] <= BACK_SECONDS
    if not _was_restarted(tape):
        # nobody had to start: there is nothing that any of it could have waited for
        assert row["set_to_ready_seconds"] <= BACK_SECONDS
        assert row["next_seconds"] <= BACK_SECONDS


@pytest.mark.timeout(3600)
def test_vllm_killed_in_its_commit(fleet: Fleet, truth: dict[str, list[int]]) -> None:
    """It comes back on the version that it was killed on the way to, and nobody has to help."""
    _begin(fleet, Case("killed-in-its-commit", 1, "Pause"))
    old, following = _versions(fleet)
    with (
        fleet.tape() as tape,
        watch_labels(fleet.environment, SELECTOR, truth, PROMPT, TOKENS) as account,
    ):
        try:
            held = _hold(fleet, tape, following)
            generation = int(_rollout(tape)["metadata"]["generation"])
            pod = next(p for p in tape.latest("pod") if p["metadata"]["uid"] == held.uid)
            assert held.is_held(tape)
            kill_container(fleet.environment, pod, "vllm")
            tape.until(
                "it is started again",
                lambda t: any(
                    p["metadata"]["uid"] == held.uid and restarts(p) > restarts(pod)
                    for p in t.latest("pod")
                ),
                PATIENCE_SECONDS,
            )
            confirmed = [word["digest"] for word in held.words(tape)]
            assert confirmed
            assert held.digest not in confirmed, "the commit was over when it was killed"
            fleet.sabotage.clear()
            _until_ready(tape, generation)
            _seen_enough(account, following)
        finally:
            tape.save(ROOT / "build" / "way-back" / "killed-in-its-commit.jsonl")
    _nobody_lied(account, judge(tape), old, following)
    assert answers(fleet.environment, SELECTOR) == [truth[following]] * 2


def _seen_enough(account: Account, now: str) -> None:
    eventually(
        "the witness has seen enough, and what is served now",
        lambda: account.compared.total() >= ENOUGH and account.compared[now],
        WITNESS_SECONDS,
    )


def _nobody_lied(account: Account, statements: Statements, *versions: str) -> None:
    """Neither labels nor statuses; and of every version that was complete so much was said."""
    assert account.lies + statements.lies == []
    assert account.compared.total() >= ENOUGH, "the witness saw too little"
    for version in versions:
        assert statements.served[version] >= ENOUGH, (
            f"nobody looked whether all serve {version}: {statements.served}"
        )


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


def _versions(fleet: Fleet) -> tuple[str, str]:
    """The good version that is served, and the other one."""
    old = _served(fleet)
    assert old in GOOD
    return old, next(version for version in GOOD if version != old)


def _there_and_back(
    fleet: Fleet, tape: Tape, truth: dict[str, list[int]], case: Case, row: dict[str, Any]
) -> tuple[str, str]:
    """The version that it went back to, and the one after."""
    old, following = _versions(fleet)
    assert answers(fleet.environment, SELECTOR) == [truth[old]] * 2
    held: Held | None = BEGIN[case.event](fleet, tape, case)
    status = _rollout(tape)["status"]
    assert status["target"]["version"] in (BAD, MISFIT), "there is no way to go back"
    row["phase"], row["reason"] = status["phase"], _reason(status)
    began = time.monotonic()
    generation = fleet.lead_to(old)
    if held is not None:
        tape.until(
            "the way back is decided", lambda t: _observed(t) >= generation, PATIENCE_SECONDS
        )
        began = held.let_go(tape)
    ready_at = _until_ready(tape, generation)
    row["back_seconds"] = round(ready_at - max(began, could_serve_since(tape, ready_at)), 2)
    row["set_to_ready_seconds"] = round(ready_at - began, 2)
    assert _rollout(tape)["status"]["stable"]["version"] == old
    assert answers(fleet.environment, SELECTOR) == [truth[old]] * 2
    assert held is None or held.has_ended(tape), "the commit that was held did not end as ordered"
    assert _charged(tape, generation) == [], "the version gone back to has failed nowhere"
    began = time.monotonic()
    ready_at = _until_ready(tape, fleet.lead_to(following))
    row["next_seconds"] = round(ready_at - began, 2)
    status = _rollout(tape)["status"]
    assert (status["stable"]["version"], status["previous"]["version"]) == (following, old)
    return old, following


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
            PATIENCE_SECONDS,
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
            PATIENCE_SECONDS,
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
    digest = fleet.digests[BAD]
    died = {
        said.body["metadata"]["uid"]
        for said in tape.said
        if said.kind == "pod" and restarts(said.body) > before.get(said.body["metadata"]["uid"], 0)
    }
    served = {uid for uid in died if any(word["digest"] == digest for word in words(tape, uid))}
    assert served, f"{died} died, and none of them has served {BAD}"


@dataclass(slots=True)
class Held:
    """A commit that waits in an engine for what the sabotage says next."""

    fleet: Fleet
    uid: str  # the pod's
    digest: str
    since: float  # monotonic seconds
    ends: str = ""  # the deed that it goes on with
    let_go_at: float = 0.0

    def words(self, tape: Tape, since: float = 0.0) -> list[Body]:
        """What was said of the engine since it is held, or since then."""
        return words(tape, self.uid, max(since, self.since))

    def is_held(self, tape: Tape) -> bool:
        """Whether the last word is that it commits, and none says how that ended."""
        said = self.words(tape)
        return said[-1]["phase"] == "Committing" and not any(map(self._is_over, said))

    def let_go(self, tape: Tape) -> float:
        """When."""
        assert self.is_held(tape), f"nothing is held any more: {self.words(tape)[-1]}"
        self.let_go_at = time.monotonic()
        self.fleet.sabotage.order(self.digest, {EVERYWHERE: self.ends})
        return self.let_go_at

    def has_ended(self, tape: Tape) -> bool:
        """As ordered, after it was let go."""
        return any(map(self._is_over, self.words(tape, self.let_go_at)))

    def _is_over(self, word: Body) -> bool:
        if not self.ends:
            return bool(word["digest"] == self.digest)
        failed = word.get("failed") or {}
        return bool(failed.get("digest") == self.digest and failed.get("step") == "Commit")


def _hold(fleet: Fleet, tape: Tape, version: str, ends: str = "") -> Held:
    """Lead to a version; once an engine is in its commit."""
    digest = fleet.digests[version]
    fleet.sabotage.order(digest, {EVERYWHERE: "hold"})
    fleet.lead_to(version)

    def committing(t: Tape) -> str:
        found = engines(t).items()
        return next((uid for uid, engine in found if engine["phase"] == "Committing"), "")

    uid = tape.until("a commit is under way", committing, PATIENCE_SECONDS)
    since = next(
        said.at
        for said in reversed(tape.said)
        if said.kind == "node"
        and any(engine["podUID"] == uid for engine in said.body["status"]["engines"])
    )
    return Held(fleet, uid, digest, since, ends)


BEGIN: dict[str, Any] = {
    "one-pod-fails": _one_pod_fails,
    "refused-at-boot": _refused_at_boot,
    "crash-loop": _crash_loop,
    "commit-fails-meanwhile": lambda fleet, tape, case: _hold(fleet, tape, BAD, "mismatch"),
    "commit-succeeds-meanwhile": lambda fleet, tape, case: _hold(fleet, tape, BAD),
}


# -- what the tape says -------------------------------------------------------------------------


def _rollout(tape: Tape) -> Body:
    return tape.latest("rollout")[0]


def _was_restarted(tape: Tape) -> bool:
    """Whether any pod is another one than in the beginning, or has another container."""
    seen: dict[str, set[int]] = {}
    for said in tape.said:
        if said.kind == "pod":
            seen.setdefault(str(said.body["metadata"]["uid"]), set()).add(restarts(said.body))
    assert len(seen) >= 2, "there were two pods"
    return len(seen) > 2 or any(len(counts) > 1 for counts in seen.values())


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
