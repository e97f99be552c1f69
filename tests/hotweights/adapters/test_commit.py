"""The order of a commit, without a vLLM: what is refused before the pause, what makes an engine
dirty, and what never happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from hotweights.adapters.vllm import commit, errors
from hotweights.adapters.vllm.commit import Switch
from hotweights.adapters.vllm.errors import EngineDead, RankError
from hotweights_transports.handoff import frames
from tests.agent.fake_engine import until

GOLDEN = [{"engine": "x", "promptTokenIds": [1, 2], "tokenIds": [3, 4]}]


class Replica:
    """Writes down what is asked of it; ``fail`` maps a step to what happens there: an exception, so
    many seconds, or a list of such.
    """

    def __init__(self, **fail: Any) -> None:
        self.world_size = 1
        self.fail = fail
        self.steps: list[str] = []
        self.tokens = [3, 4]
        self.probes = GOLDEN

    @property
    def resumed(self) -> bool:
        return not {"open", "resume"}.isdisjoint(self.steps)

    async def _step(self, name: str) -> None:
        self.steps.append(name)
        failure = self.fail.get(name)
        if isinstance(failure, list):  # one each time, and then none
            failure = failure.pop(0) if failure else None
        if isinstance(failure, float):
            await asyncio.sleep(failure)
        elif failure is not None:
            raise failure

    async def ranks(self, command: str, argument: Any = None) -> list[dict[str, Any]]:
        await self._step(f"{command} {argument}" if command == "watch" else command)
        return [{"ok": True, "rank": 0, "probes": self.probes}]

    async def asleep(self) -> bool:
        return "asleep" in self.fail

    async def pause(self, mode: str) -> None:
        await self._step(f"pause {mode}")

    async def resume(self) -> None:
        await self._step("resume")

    async def forget_caches(self) -> None:
        await self._step("forget")

    async def label(self, version: str) -> None:
        await self._step("label")

    async def switch(
        self, digest: str, prompts: list[list[int]], lengths: list[int]
    ) -> tuple[list[dict[str, Any]], float]:
        await self._step("install")
        return await self.probe(prompts, lengths), 0.001

    async def open(self, version: str) -> None:
        await self._step("open")

    async def probe(self, prompts: list[list[int]], lengths: list[int]) -> list[dict[str, Any]]:
        await self._step("probe")
        return [{"tokens": self.tokens, "nan": "nan" in self.fail} for _ in prompts]


class Engine:
    def __init__(self, **fail: Any) -> None:
        self.engine_client = Replica(**fail)
        self.told: list[frames.State] = []
        self.switch = Switch(self.engine_client, 5.0, self.told.append, state="Serving")  # type: ignore[arg-type]

    async def commit(self, digest: str = "new", token: int = 1, **values: Any) -> Any:
        return await self.switch.commit(frames.Commit(digest=digest, commit_token=token, **values))


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    reasons: list[str] = []

    monkeypatch.setattr(errors, "end_process", reasons.append)
    return reasons


async def test_a_commit_goes_in_this_order() -> None:
    engine = Engine()
    answer = await engine.commit()
    assert isinstance(answer, frames.Committed)
    assert answer.probe == "Golden"
    assert engine.engine_client.steps == [
        "check",
        "pause Keep",
        "install",
        "probe",
        "open",
        "settle",
    ]
    assert (engine.switch.digest, engine.switch.token, engine.switch.dirty, engine.switch.torn) == (
        "new",
        1,
        False,
        False,
    )


async def test_without_golden_tokens_an_answer_has_to_come_without_nan() -> None:
    engine = Engine()
    engine.engine_client.probes = []
    assert (await engine.commit()).probe == "Ran"
    engine = Engine(nan=True)
    engine.engine_client.probes = []
    assert (await engine.commit()).reason == "ProbeMismatch"


async def test_what_proved_a_version_goes_with_it() -> None:
    engine = Engine()
    assert engine.switch.probed == "None"
    await engine.commit("old")
    assert engine.switch.probed == "Golden"
    engine.engine_client.probes = []
    engine.engine_client.fail = {"install": RuntimeError("torn")}
    await engine.commit("new", token=2)  # it would have been proved by less
    engine.engine_client.fail = {}
    await engine.switch.repair()
    assert [(state.state, state.digest, state.probe) for state in engine.told] == [
        ("Dirty", "old", "Golden"),
        ("Serving", "old", "Golden"),
    ]
    assert (await engine.commit("new", token=3)).probe == "Ran"
    assert (await engine.commit("new", token=4)).probe == "Ran"


async def test_what_is_refused_is_refused_before_the_pause() -> None:
    engine = Engine(check=RankError("NotPrepared", "rank 0: no"))
    answer = await engine.commit()
    assert (answer.reason, answer.dirty, engine.engine_client.steps) == (
        "NotPrepared",
        False,
        ["check", "unpin"],
    )


@pytest.mark.parametrize(
    "probes",
    [[{}], [{"promptTokenIds": [1], "tokenIds": ["x"]}], [{"promptTokenIds": 1, "tokenIds": []}]],
)
async def test_malformed_probes_are_refused_before_the_pause(probes: list[Any]) -> None:
    engine = Engine()
    engine.engine_client.probes = probes
    answer = await engine.commit()
    assert (answer.reason, answer.dirty) == ("CommitFailed", False)
    assert "pause Keep" not in engine.engine_client.steps


async def test_an_older_token_is_refused_and_an_equal_one_repeats_the_answer() -> None:
    engine = Engine()
    await engine.commit(token=5)
    assert (await engine.commit("other", token=4)).reason == "StaleToken"
    engine.engine_client.steps.clear()
    again = await engine.commit(token=5)
    assert isinstance(again, frames.Committed)
    assert again.pause_seconds == 0
    assert engine.engine_client.steps == []


async def test_keep_is_fenced_too() -> None:
    engine = Engine()
    assert engine.switch.keep(3)
    assert not engine.switch.keep(2)
    assert (await engine.commit(token=2)).reason == "StaleToken"


async def test_two_commits_at_a_time_are_one_or_busy() -> None:
    engine = Engine(install=0.05)
    first, same, other = await asyncio.gather(
        engine.commit(), engine.commit(), engine.commit("other")
    )
    assert isinstance(first, frames.Committed)
    assert isinstance(same, frames.Committed)
    assert other.reason == "Busy"
    assert engine.engine_client.steps.count("install") == 1


async def test_a_drain_that_does_not_end_changes_nothing() -> None:
    engine = Engine(**{"pause Wait": 1.0})
    answer = await engine.commit(mode="Wait", drain_seconds=0.01)
    assert (answer.reason, answer.dirty) == ("DrainTimeout", False)
    assert engine.engine_client.steps == ["check", "pause Wait", "resume", "unpin"]


async def test_a_pause_that_fails_changes_nothing() -> None:
    engine = Engine(**{"pause Keep": RuntimeError("cache")})
    answer = await engine.commit()
    assert (answer.reason, answer.dirty) == ("CommitFailed", False)
    assert "install" not in engine.engine_client.steps


@pytest.mark.parametrize(
    ("fail", "reason"),
    [
        ({"install": RankError("CommitFailed", "rank 1: torn")}, "CommitFailed"),
        ({"install": RuntimeError("anything")}, "CommitFailed"),
        ({"install": 1.0}, "CommitFailed"),
        ({"probe": RuntimeError("anything")}, "CommitFailed"),
        ({"nan": True}, "ProbeMismatch"),
    ],
    ids=["rank", "error", "deadline", "probe", "nan"],
)
async def test_a_failure_after_the_copy_began_is_dirty_and_never_resumed(
    fail: dict[str, Any], reason: str
) -> None:
    engine = Engine(**fail)
    answer = await engine.commit(deadline_seconds=0.02)
    assert (answer.reason, answer.dirty) == (reason, True)
    assert not engine.engine_client.resumed
    assert (engine.switch.digest, engine.switch.state) == (None, "Dirty")
    assert [state.state for state in engine.told] == ["Dirty"]
    assert (await engine.commit(token=9)).reason == "EngineDirty"


async def test_a_wrong_answer_is_dirty() -> None:
    engine = Engine()
    engine.engine_client.tokens = [3, 5]
    answer = await engine.commit()
    assert (answer.reason, answer.dirty) == ("ProbeMismatch", True)
    assert "[3, 5], expected [3, 4]" in answer.message


async def test_a_repair_is_probed_before_it_resumes(ended: list[str]) -> None:
    engine = Engine()
    await engine.commit("old")
    engine.engine_client.fail = {"install": RuntimeError("torn")}
    await engine.commit("new", token=2)
    engine.engine_client.steps.clear()
    await engine.switch.repair()
    assert engine.engine_client.steps == [
        "pause Keep",
        "repair",
        "forget",
        "probe",
        "settle",
        "label",
        "resume",
    ]
    assert (engine.switch.digest, engine.switch.dirty, ended) == ("old", False, [])
    assert (engine.told[-1].state, engine.told[-1].digest, engine.told[-1].reason) == (
        "Serving",
        "old",
        "Repaired",
    )


async def test_an_engine_that_is_repaired_and_does_not_resume_stays_dirty(
    ended: list[str],
) -> None:
    """Else a commit would get between the two attempts, or the boot barrier open a paused engine."""
    engine = Engine(install=[RuntimeError("torn")], resume=[0.2, RuntimeError("no")])
    await engine.commit()
    repair = asyncio.create_task(engine.switch.repair())
    await until(lambda: "resume" in engine.engine_client.steps, 30.0)
    assert (await engine.commit(token=2)).reason == "EngineDirty"
    await repair
    assert (engine.switch.dirty, engine.switch.state, ended) == (False, "Serving", [])
    engine.engine_client.fail["install"].append(RuntimeError("torn"))
    await engine.commit(token=3)
    engine.engine_client.steps.clear()
    await engine.switch.repair()
    assert engine.engine_client.steps.count("repair") == 2, "it is repaired once more"
    assert (engine.switch.dirty, ended) == (False, [])


@pytest.mark.parametrize("broken", ["repair", "forget", "probe", "resume"])
async def test_what_cannot_be_repaired_ends_the_process(ended: list[str], broken: str) -> None:
    engine = Engine(install=RuntimeError("torn"))
    await engine.commit()
    engine.engine_client.fail = {broken: RuntimeError("still")}
    await engine.switch.repair()
    assert len(ended) == 1
    assert engine.switch.dirty
    assert broken == "resume" or not engine.engine_client.resumed


async def test_a_sleeping_engine_is_asked_again_later() -> None:
    engine = Engine(asleep=True)
    answer = await engine.commit()
    assert isinstance(answer, frames.CommitFailed)
    assert (answer.reason, answer.dirty) == ("Busy", False)
    assert "/wake_up" in answer.message
    assert engine.engine_client.steps == ["unpin"]


async def test_an_engine_that_does_not_resume_after_a_pause_that_failed_is_dirty() -> None:
    """It stays paused for nobody knows how long: a repair ends that, or the process."""
    refused = RuntimeError("a cache cannot be reset")
    engine = Engine(**{"pause Keep": refused, "resume": RuntimeError("no")})
    answer = await engine.commit()
    assert isinstance(answer, frames.CommitFailed)
    assert (answer.reason, answer.dirty) == ("CommitFailed", True)
    assert "does not resume: no" in answer.message
    assert engine.switch.dirty
    assert [state.state for state in engine.told] == ["Dirty"]


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (RuntimeError("lost"), "could not ask the ranks: lost"),
        (60.0, "did not answer within 0.02 s"),
    ],
    ids=["lost", "late"],
)
async def test_a_yes_of_a_rank_that_was_not_heard_is_taken_back(
    check: Exception | float, message: str
) -> None:
    """The rank has pinned the version by then, and would be busy for every other."""
    engine = Engine(check=check)
    answer = await engine.commit(deadline_seconds=0.02)
    assert (answer.reason, answer.dirty) == ("CommitFailed", False)
    assert message in answer.message
    assert engine.engine_client.steps == ["check", "unpin"]


async def test_an_engine_that_does_not_answer_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it was asked it does once it can, one after the other: it paused, and resumes."""
    monkeypatch.setattr(commit, "TIDY_SECONDS", 0.02)
    engine = Engine(**{"pause Keep": 60.0, "resume": 60.0, "unpin": 60.0})
    answer = await engine.commit(deadline_seconds=0.02)
    assert (answer.reason, answer.dirty) == ("CommitFailed", False)
    assert "did not pause within 0.02 s; nothing was changed" in answer.message
    assert engine.engine_client.steps == ["check", "pause Keep", "resume", "unpin"]
    assert engine.told == []
    engine.engine_client.fail = {"settle": 60.0}
    assert isinstance(await engine.commit(token=2), frames.Committed)


@pytest.mark.parametrize("fail", [{}, {"probe": RuntimeError("no")}])
async def test_the_booted_weights_are_probed_as_in_a_pause_and_then_served_without_counting(
    fail: dict[str, Exception],
) -> None:
    engine = Engine(**fail)
    await engine.switch.remember_boot()
    assert engine.engine_client.steps == ["watch True", "probe", "watch False"]


async def test_a_repair_that_answers_otherwise_than_before_ends_the_process(
    ended: list[str],
) -> None:
    engine = Engine()
    await engine.switch.remember_boot()
    engine.engine_client.fail = {"install": RuntimeError("torn")}
    await engine.commit()
    engine.engine_client.fail = {}
    engine.engine_client.tokens = [9, 9]
    await engine.switch.repair()
    assert len(ended) == 1
    assert not engine.engine_client.resumed


@pytest.mark.parametrize("step", ["check", "pause Keep", "install", "probe", "open"])
async def test_a_dead_engine_ends_the_process(ended: list[str], step: str) -> None:
    engine = Engine(**{step: EngineDead("gone")})
    with pytest.raises(EngineDead):
        await engine.commit()
    assert len(ended) == 1


async def test_a_commit_that_is_cancelled_inside_the_pause_leaves_its_mark() -> None:
    engine = Engine(install=60.0)
    task = asyncio.create_task(engine.commit(deadline_seconds=60.0))
    await until(lambda: "install" in engine.engine_client.steps, 30.0)
    task.cancel()
    await asyncio.wait([task])
    assert engine.switch.torn


async def test_tidying_up_cannot_undo_a_commit() -> None:
    engine = Engine(settle=RuntimeError("busy"))
    assert isinstance(await engine.commit(), frames.Committed)


@pytest.mark.parametrize(
    "call", [lambda switch: switch.commit(frames.Commit(digest="n", mode="Sideways"))]
)
async def test_an_unknown_mode_is_refused(call: Callable[[Switch], Any]) -> None:
    assert (await call(Engine().switch)).reason == "CommitFailed"
