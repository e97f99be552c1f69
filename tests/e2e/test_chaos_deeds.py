"""What a round does to a cluster has an end, whatever happens in between; and a cluster that shows
what it showed before has not converged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from e2e.chaos import deeds, play
from e2e.chaos.rounds import Fault, Round, choose
from e2e.harness import samples
from e2e.harness.witness import LABEL

Body = dict[str, Any]
PLANNED = replace(choose(1, 1)[0], delay_seconds=0.0, fault_seconds=0.0, victim=1)


def pod(name: str, *, version: str = "", lives: int = 0, ready: bool = True) -> Body:
    return {
        "metadata": {"name": name, "uid": name, "labels": {LABEL: version}},
        "status": {
            "conditions": [{"type": "Ready", "status": str(ready)}],
            "containerStatuses": [{"restartCount": lives, "state": {"running": {}}}],
        },
    }


class Cluster:
    """What a round sees of one, and what it did to it, in order."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.engines = [pod("llm-0", version="v0"), pod("llm-1", version="v0")]
        self.ready, self.observed, self.target = True, 7, "v0"
        self.in_samples = self.cluster = self.control_plane = self
        self.nodes = [self._node(0), self._node(1)]

    def _node(self, number: int) -> SimpleNamespace:
        def note(what: str) -> Callable[[], None]:
            return lambda: self.did.append(f"{what} {number}")

        return SimpleNamespace(unplug=note("unplug"), plug=note("plug"))

    def stop_apiserver(self) -> None:
        self.did.append("stop")

    def start_apiserver(self) -> None:
        self.did.append("start")

    def pods(self, selector: str) -> list[Body]:
        return list(self.engines)

    def get(self, *arguments: str) -> Body:
        status = {
            "conditions": [{"type": "Ready", "status": str(self.ready)}],
            "observedGeneration": self.observed,
            "target": {"version": self.target},
        }
        return {"metadata": {"generation": 7}, "status": status}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()

    def kill(environment: Any, pod: Body, container: str, signal: str) -> None:
        made.did.append(f"{signal} {pod['metadata']['name']}")

    def change(environment: Any, planned: Round) -> None:
        made.did.append("change")

    monkeypatch.setattr(deeds, "kill_container", kill)
    monkeypatch.setattr(deeds, "change", change)
    monkeypatch.setattr(samples, "system_pods", lambda environment, component: [pod(component)])
    return made


ENDS = [
    (Fault.STOP_ENGINE, ["SIGSTOP llm-1", "SIGCONT llm-1"]),
    (Fault.CUT_API_SERVER, ["stop", "start"]),
    (Fault.CUT_NODE, ["unplug 1", "plug 1"]),
]


@pytest.mark.parametrize(("fault", "did"), ENDS)
def test_who_interrupts_a_fault_ends_it(cluster: Any, fault: Fault, did: list[str]) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        deeds.fault(cluster, replace(PLANNED, fault=fault)),
    ):
        raise KeyboardInterrupt
    assert cluster.did == did


@pytest.mark.parametrize(("fault", "did"), ENDS)
@pytest.mark.parametrize("is_fault_first", [True, False])
def test_a_change_comes_before_a_fault_or_while_it_lasts(
    cluster: Any, fault: Fault, did: list[str], is_fault_first: bool
) -> None:
    begin, end = did
    planned = replace(PLANNED, fault=fault, is_fault_first=is_fault_first)
    play.strike(cluster, planned, play.Cut())
    if not is_fault_first:
        assert cluster.did == ["change", begin, end]
    elif fault is Fault.CUT_API_SERVER:  # it hears nothing before
        assert cluster.did == [begin, end, "change"]
    else:
        assert cluster.did == [begin, "change", end]


def test_what_was_killed_is_back_when_it_lives_again_or_is_gone(cluster: Any) -> None:
    with deeds.fault(cluster, replace(PLANNED, fault=Fault.KILL_ENGINE)) as seen:
        assert cluster.did == ["SIGKILL llm-1"]
        assert not seen(), "its pod shows what it showed before"
        cluster.engines[1] = pod("llm-1", lives=1)
        assert seen()
        del cluster.engines[1]
        assert seen()


def test_the_witness_is_told_what_was_cut_off() -> None:
    cut = play.Cut()
    assert not cut.since(1.0)
    with cut.during():
        assert cut.since(1e12)
    assert cut.since(1.0), "what began before it ended may have met it"
    assert not cut.since(1e12)


def _no_change(cluster: Cluster) -> None:
    """All is as it is to be."""


def _unseen(cluster: Cluster) -> None:
    cluster.observed = 6


def _elsewhere(cluster: Cluster) -> None:
    cluster.target = "v1"


def _one_gone(cluster: Cluster) -> None:
    del cluster.engines[0]


def _label(cluster: Cluster) -> None:
    cluster.engines[0] = pod("llm-0", version="v1")


def _not_ready(cluster: Cluster) -> None:
    cluster.engines[0] = pod("llm-0", version="v0", ready=False)


@pytest.mark.parametrize(
    ("happened", "named"),
    [
        (_no_change, ""),
        (_unseen, "the rollout is"),
        (_elsewhere, "Ready with v1, not v0"),
        (_one_gone, "1 pods, not 2"),
        (_label, "llm-0 says v1, not v0"),
        (_not_ready, "llm-0 is not Ready"),
    ],
)
def test_what_is_lacking_is_named(
    cluster: Any, happened: Callable[[Cluster], None], named: str
) -> None:
    happened(cluster)
    assert [named in one for one in play.lacking(cluster, "v0", 2)] == [True] * bool(named)
