"""Every alert fires for what it is meant for and says what is meant, and is quiet otherwise, as
Prometheus' own promtool plays it; and each has a section in the runbooks.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "helm" / "hotweights" / "monitoring" / "alerts.yaml"
RUNBOOKS = ROOT / "docs" / "runbooks.md"
OF = 'namespace="models",name="llm"'
LLM = {"namespace": "models", "name": "llm"}
NODE = {"instance": "n0:8080"}
AT = 'instance="n0:8080"'


@dataclass(frozen=True)
class Case:
    """What Prometheus has seen (``1x60``: 1, and sixty times more), and what comes of it."""

    alert: str
    series: dict[str, str]
    at: str
    summary: str = ""  # empty: it is quiet
    labels: dict[str, str] = field(default_factory=dict)
    every: str = "1m"  # what has to be seen for a day is looked at less often


def condition(type_: str, reason: str = "r") -> str:
    return f'hotweights_rollout_condition{{{OF},type="{type_}",reason="{reason}"}}'


def pods(state: str) -> str:
    return f'hotweights_rollout_pods{{{OF},state="{state}"}}'


def capacity(kind: str) -> str:
    return f'hotweights_agent_capacity_bytes{{{AT},kind="{kind}"}}'


STALLED = condition("Stalled", "ProbeMismatch")
PAUSED = condition("Paused", "Requested")
FAILURES = f'hotweights_rollout_failures{{{OF},reason="AgentMissing"}}'
MIXED = {pods("updated"): "1x200", pods("desired"): "3x200"}
PAUSES = "hotweights_agent_pause_seconds_bucket"
CASES = (
    Case("HotweightsRolloutStalled", {STALLED: "1x60"}, "6m",
         "WeightRollout models/llm does not go on (ProbeMismatch).",
         {**LLM, "type": "Stalled", "reason": "ProbeMismatch"}),
    Case("HotweightsRolloutStalled", {STALLED: "1x60"}, "4m"),
    Case("HotweightsPodsFailed", {pods("failed"): "2x60"}, "11m",
         "2 pods of WeightRollout models/llm failed to take the version.",
         {**LLM, "state": "failed"}),
    Case("HotweightsPodsFailed", {pods("failed"): "2x60", STALLED: "1x60"}, "30m"),
    Case("HotweightsPodsUnreachable", {FAILURES: "1x60"}, "16m",
         "1 pods of WeightRollout models/llm cannot be told anything (AgentMissing).",
         {**LLM, "reason": "AgentMissing"}),
    Case("HotweightsVersionsMixed", {**MIXED, condition("Progressing"): "0x200"}, "61m",
         "Only 1 pods of WeightRollout models/llm serve its version, for an hour.",
         {**LLM, "state": "updated"}),
    Case("HotweightsVersionsMixed", {**MIXED, condition("Progressing"): "1x200"}, "2h"),
    Case("HotweightsVersionsMixed", {pods("updated"): "3x200", pods("desired"): "3x200"}, "2h"),
    Case("HotweightsRolloutUnavailable",
         {condition("Available", "TooFewPodsReady"): "0x60", pods("desired"): "3x60"}, "11m",
         "More pods of WeightRollout models/llm are out of service than it may take out.",
         {**LLM, "type": "Available", "reason": "TooFewPodsReady"}),
    Case("HotweightsRolloutUnavailable",
         {condition("Available", "TooFewPodsReady"): "0x60", pods("desired"): "0x60"}, "30m"),
    Case("HotweightsRolloutPaused", {PAUSED: "1x150"}, "24h10m",
         "WeightRollout models/llm has been paused for a day.",
         {**LLM, "type": "Paused", "reason": "Requested"}, every="10m"),
    Case("HotweightsRolloutPaused", {PAUSED: "1x150", condition("Ready"): "1x150"}, "24h10m", every="10m"),
    Case("HotweightsRolloutPaused", {PAUSED: "1x150", STALLED: "1x150"}, "24h10m", every="10m"),
    Case("HotweightsVersionUnusable",
         {'hotweights_versions{namespace="models",reason="ChecksumMismatch"}': "2x60"}, "11m",
         "2 WeightVersions of namespace models cannot be used (ChecksumMismatch).",
         {"namespace": "models", "reason": "ChecksumMismatch"}),
    Case("HotweightsVersionUnusable",
         {'hotweights_versions{namespace="models",reason="Resolving"}': "2x60"}, "30m"),
    Case("HotweightsOperatorDown", {'hotweights_operator_build_info{version="1"}': "1x10 stale"},
         "17m", "No Hotweights operator is scraped.", {}),
    Case("HotweightsOperatorDown", {'hotweights_operator_build_info{version="1"}': "1x60"}, "30m"),
    Case("HotweightsOperatorLeaderless",
         {'hotweights_operator_leader{pod="a"}': "0x60", 'hotweights_operator_leader{pod="b"}': "0x60"},
         "3m", "No Hotweights operator leads.", {}),
    Case("HotweightsOperatorLeaderless",
         {'hotweights_operator_leader{pod="a"}': "0x60", 'hotweights_operator_leader{pod="b"}': "1x60"},
         "30m"),
    Case("HotweightsOperatorDeaf",
         {'hotweights_operator_watch_age_seconds{kind="pod"}': "0+60x60"}, "9m",
         "The operator has heard nothing of pod objects for 9m 0s.", {"kind": "pod"}),
    Case("HotweightsOperatorBehind", {"hotweights_operator_workqueue_oldest_seconds": "90x60"},
         "6m", "Decisions wait for 1m 30s in the operator.", {}),
    Case("HotweightsOperatorDefect",
         {'hotweights_operator_reconcile_total{kind="rollout",result="defect"}': "0x5 1x60"},
         "8m", "A defect of the operator keeps it from deciding about a rollout.",
         {"kind": "rollout"}),
    Case("HotweightsOperatorDefect",
         {'hotweights_operator_reconcile_total{kind="rollout",result="error"}': "0+1x60"}, "20m"),
    Case("HotweightsObjectsMalformed",
         {'hotweights_operator_malformed_objects{kind="rollout"}': "1x60"}, "16m",
         "1 rollout objects do not fit this release.", {"kind": "rollout"}),
    Case("HotweightsSourceDamaged",
         {f"hotweights_agent_checksum_failures_total{{{AT}}}": "0x5 1x60"}, "8m",
         "n0:8080 read other bytes than a version promises.", NODE),
    Case("HotweightsSourceDamaged",
         {f"hotweights_agent_checksum_failures_total{{{AT}}}": "1x60"}, "30m"),
    Case("HotweightsEngineDirty", {f'hotweights_agent_engines{{{AT},phase="Dirty"}}': "1x60"},
         "3m", "1 engines on n0:8080 broke in the middle of a switch and are not repaired.",
         {**NODE, "phase": "Dirty"}),
    Case("HotweightsCommitsBreak",
         {f'hotweights_agent_commits_total{{{AT},result="Dirty"}}': "0x5 1x60"}, "8m",
         "A switch broke in the middle on n0:8080 within the last hour.",
         {**NODE, "result": "Dirty"}),
    Case("HotweightsCommitsBreak",
         {f'hotweights_agent_commits_total{{{AT},result="Committed"}}': "0+1x60"}, "30m"),
    Case("HotweightsPausesLong",
         {f'{PAUSES}{{{AT},le="5.0"}}': "0x60", f'{PAUSES}{{{AT},le="10.0"}}': "0+1x60",
          f'{PAUSES}{{{AT},le="+Inf"}}': "0+1x60"}, "30m",
         "One switch in a hundred pauses its engine for more than 9.95s.", {}),
    Case("HotweightsPausesLong",
         {f'{PAUSES}{{{AT},le="5.0"}}': "0+1x60", f'{PAUSES}{{{AT},le="+Inf"}}': "0+1x60"}, "30m"),
    Case("HotweightsSourceHangs", {f"hotweights_agent_stuck_reads{{{AT}}}": "3x60"}, "16m",
         "3 readings of sources hang in the kernel of n0:8080.", NODE),
    Case("HotweightsNodeFull", {capacity("memory"): "1000x60", capacity("free"): "10x60"}, "31m",
         "n0:8080 has less than 2 % of its memory for versions left.",
         {**NODE, "kind": "memory"}),
    Case("HotweightsNodeFull", {capacity("memory"): "1000x60", capacity("free"): "30x60"}, "50m"),
    Case("HotweightsWritesRefused",
         {f'hotweights_agent_api_writes_total{{{AT},object="pods",result="refused"}}': "0x5 1x60"},
         "8m", "The API server refuses what n0:8080 writes about pods.",
         {**NODE, "object": "pods"}),
    Case("HotweightsAgentDefect", {f"hotweights_agent_defects_total{{{AT}}}": "0x5 1x60"}, "8m",
         "A defect of the agent n0:8080 cost it a message or an engine.", NODE),
)  # fmt: skip


def rules() -> dict[str, Any]:
    """The alerts by name."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    if program is None:
        raise FileNotFoundError("promtool is missing: install the Debian package prometheus")
    return subprocess.run(
        [program, *words], capture_output=True, text=True, check=False, timeout=50
    )


def played(case: Case) -> dict[str, Any]:
    """A case as promtool reads it."""
    rule = rules()[case.alert]
    annotations = {**rule["annotations"], "summary": case.summary}
    labels = {**case.labels, "severity": rule["labels"]["severity"]}
    expected = [{"exp_labels": labels, "exp_annotations": annotations}] if case.summary else []
    return {
        "name": f"{case.alert} at {case.at}",
        "interval": case.every,
        "input_series": [{"series": s, "values": values} for s, values in case.series.items()],
        "alert_rule_test": [
            {"eval_time": case.at, "alertname": case.alert, "exp_alerts": expected}
        ],
    }


@pytest.mark.parametrize("name", sorted(rules()))
def test_each_fires_when_it_should_and_says_what_is_meant(name: str, tmp_path: Path) -> None:
    """By itself: promtool works out every rule of a file for every minute of every case."""
    alone, file = tmp_path / "alone.yaml", tmp_path / "alerts_test.yaml"
    alone.write_text(yaml.safe_dump({"groups": [{"name": "alone", "rules": [rules()[name]]}]}))
    cases = [case for case in CASES if case.alert == name]
    body = {
        "rule_files": [alone.name],
        "evaluation_interval": cases[0].every,
        "tests": [played(case) for case in cases],
    }
    file.write_text(yaml.safe_dump(body))
    done = promtool("test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_is_tried() -> None:
    assert {case.alert for case in CASES if case.summary} == set(rules())


def test_their_expressions_are_sound() -> None:
    done = promtool("check", "rules", RULES)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", sorted(rules()))
def test_each_has_a_runbook_and_a_severity(name: str) -> None:
    rule = rules()[name]
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"]["runbook_url"] == f"docs/runbooks.md#{name.lower()}"
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", RUNBOOKS.read_text(), re.M | re.S)
    assert section is not None, f"docs/runbooks.md has no section {name}"
    for part in ("**Meaning.**", "**How to see it.**", "**What to do.**"):
        assert part in section[1], part


def test_no_runbook_is_of_an_alert_that_is_gone() -> None:
    assert set(re.findall(r"^## (Hotweights\w+)$", RUNBOOKS.read_text(), re.M)) == set(rules())
