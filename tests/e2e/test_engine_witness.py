"""What the tests of real engines take for a repair, and for two versions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from e2e.engine import conftest
from e2e.engine.conftest import Engine, told_apart
from e2e.engine.launch import PROMPTS, TOKENS
from hotweights_transports.handoff import frames


def engine(folder: Path, *said: frames.State) -> Engine:
    """One that says no more."""

    def until(condition: Callable[[], Any], seconds: float) -> Any:
        if not (found := condition()):
            raise TimeoutError
        return found

    made = Engine.__new__(Engine)
    agent: Any = SimpleNamespace(until=until, peers={"server": SimpleNamespace(states=list(said))})
    made.agent, made.order = agent, folder / "sabotage"
    return made


DIRTY = frames.State("Dirty", "v0", 1, "CommitFailed", "")
REPAIRED = frames.State("Serving", "v0", 1, "Repaired", "")


def test_a_repair_of_an_earlier_turn_does_not_count(tmp_path: Path) -> None:
    assert engine(tmp_path, DIRTY, REPAIRED).repaired(0) == REPAIRED
    for said in ([], [DIRTY]):
        with pytest.raises(TimeoutError):
            engine(tmp_path, DIRTY, REPAIRED, *said).repaired(2)
    assert engine(tmp_path, DIRTY, REPAIRED, DIRTY, REPAIRED).repaired(2) == REPAIRED


def test_who_was_never_dirty_was_not_repaired(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        engine(tmp_path, REPAIRED).repaired(0)


def test_an_order_that_nobody_reads_is_not_taken(tmp_path: Path) -> None:
    one = engine(tmp_path)
    one.order.write_text("slow")
    with pytest.raises(TimeoutError):
        one.takes_its_order()
    one.order.unlink()
    one.takes_its_order()


def test_versions_that_answer_alike_are_no_two_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conftest, "_cold_load", lambda model: "[]")
    numbers = itertools.count()

    def model(*firsts: int, prompts: Any = PROMPTS) -> Path:
        folder = tmp_path / f"model-{next(numbers)}"
        probes = [
            {"promptTokenIds": list(prompt), "tokenIds": [first, *[0] * (TOKENS - 1)]}
            for prompt, first in zip(prompts, firsts, strict=True)
        ]
        folder.with_name(f"{folder.name}.golden.json").write_text(json.dumps(probes))
        return folder

    told_apart(model(1, 2, 3), model(4, 5, 6))
    with pytest.raises(AssertionError, match="it would pass"):
        told_apart(model(1, 2, 3), model(4, 2, 6))
    with pytest.raises(AssertionError, match="of other prompts"):
        told_apart(model(1, prompts=PROMPTS[:1]), model(2, prompts=PROMPTS[:1]))
    with pytest.raises(AssertionError, match="of other prompts"):
        told_apart(tmp_path / "never-recorded", model(1, 2, 3))
