"""A thousand whole rollouts with faults and stale reads: every invariant after every step, and each
comes to a good end.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from hotweights_operator import simulate as command
from hotweights_operator.decide import rollout_status
from hotweights_operator.sim import coverage, story
from hotweights_operator.sim.coverage import Counts
from hotweights_operator.sim.run import simulate

SEEDS_PER_TEST = 50
TESTS = 20


HAPPENED: Counts = Counter()
PLAYED: set[int] = set()


@pytest.mark.timeout(300)  # some eight seconds on an idle core
@pytest.mark.parametrize("block", range(TESTS))
def test_every_story_ends_well(block: int) -> None:
    for seed in range(block * SEEDS_PER_TEST, (block + 1) * SEEDS_PER_TEST):
        HAPPENED.update(simulate(seed).api.counts)
    PLAYED.add(block)


def test_everything_that_may_happen_did() -> None:
    """A fault or a path that no story takes any more would be held by nothing."""
    if len(PLAYED) < TESTS:
        pytest.fail("it counts what the stories above did: run all of this file")
    assert [name for name in coverage.expected(story.names()) if not HAPPENED[name]] == []


def test_a_seed_tells_the_same_story_twice() -> None:
    told: list[list[str]] = [[], []]
    for lines in told:
        simulate(7, lines.append)
    assert told[0] == told[1]


@pytest.mark.parametrize(
    "strategy", [{"type": "AllAtOnce"}, {"type": "Rolling", "rolling": {"maxUnavailable": 2}}]
)
def test_plan_prints_a_rollout_before_it_happens(
    strategy: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = {
        "versionRef": {"name": "big-one"},
        "target": {"selector": {"matchLabels": {"x": "y"}}},
        "strategy": strategy,
    }
    file = tmp_path / "rollout.yaml"
    file.write_text(yaml.dump_all([{"kind": "ConfigMap"}, {"kind": "WeightRollout", "spec": spec}]))
    assert command.main(["plan", "-f", str(file), "--pods", "8", "--nodes", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "big-one is applied" in lines[0]
    assert "8 of 8 updated" in lines[-1]
    most = max(line.count("pod-") for line in lines)
    assert most > 2 if strategy["type"] == "AllAtOnce" else most in (1, 2)


def test_plan_says_what_is_wrong_with_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text(json.dumps({"kind": "Pod"}))
    assert command.main(["plan", "-f", str(file)]) == 2
    assert "no WeightRollout" in capsys.readouterr().err


def test_run_counts_what_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    assert command.main(["run", "--seeds", "3", "--jobs", "1", "--json", str(file)]) == 0
    told = capsys.readouterr().out
    assert "3 stories, every invariant held" in told
    assert "told to change" in told
    found = json.loads(file.read_text())
    assert found["violations"] == {}
    assert found["counts"]["gate passed"] > 0
    assert set(found["missing"]).isdisjoint(found["counts"])


def test_no_story_at_all_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["run", "--seeds", "0"]) == 2
    assert "no story was told" in capsys.readouterr().err


def test_a_violation_is_told_with_its_seed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Complete, whatever pods serve
    monkeypatch.setattr(rollout_status, "_is_complete", lambda view, status: True)
    assert command.main(["run", "--seeds", "2", "--jobs", "1"]) == 1
    assert "(seed 0, " in capsys.readouterr().err


def test_everything_that_is_counted_has_a_name() -> None:
    """What the world counts under a misspelt name would be missed in a long run."""
    seen = set().union(*(simulate(seed).api.counts for seed in range(4)))
    assert seen <= set(coverage.expected(story.names()))
