"""The simulated world does what the real one does: kubelets lag, engines give up, agents forget,
the API server refuses.
"""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from hotweights_crds.nodeweights import (
    MAX_STAGE,
    NodeWeightsSpec,
    PodAssignment,
    RolloutAssignment,
    StageItem,
)
from hotweights_operator.model.actions import Assign
from hotweights_operator.model.objects import NodeState, Pod
from hotweights_operator.sim.cluster.api import Api, Invalid
from hotweights_operator.sim.cluster.bad_versions import Flaw
from hotweights_operator.sim.cluster.fleet import Fleet
from hotweights_operator.sim.cluster.kubelet import BACK_OFF_SECONDS
from hotweights_operator.sim.cluster.schema import excess

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NODE, POD = "n", "p"
V0, V1 = "sha256:v0", "sha256:v1"


class World:
    """One node with one pod, and what it is told."""

    def __init__(self, **flaws: Flaw) -> None:
        self.api = Api()
        self.fleet = Fleet(self.api, random.Random(1), NOW)
        self.fleet.faults.flaws.update(
            {f"sha256:{version}": flaw for version, flaw in flaws.items()}
        )
        self.fleet.add_node(NODE)
        self.fleet.kubelets.start_pod(Pod(POD, POD, "team", NODE))
        self.api.put("state", NODE, NodeState(NODE, generation=1))
        self.token = 0

    def tell(
        self, digest: str = "", prepare: str = "", revision: int = 1, *, anew: bool = True
    ) -> None:
        """Write the pod's entry."""
        self.token += anew
        order = PodAssignment(
            uid=POD,
            name=POD,
            namespace="team",
            token=self.token,
            revision=revision,
            digest=digest,
            prepare=prepare,
        )
        stage = [
            StageItem(digest=item, namespace="team", uri=f"file:///team/{item}")
            for item in (V0, V1)
        ]
        spec = NodeWeightsSpec(
            rollouts=[RolloutAssignment(uid="r", namespace="team", stage=stage, pods=[order])]
        )
        state: NodeState = self.api.get("state", NODE)
        self.api.put("state", NODE, replace(state, spec=spec, generation=state.generation + 1))

    def go(self, seconds: float) -> None:
        """Let time pass."""
        for _ in range(round(seconds * 2)):
            self.fleet.now += timedelta(seconds=0.5)
            self.fleet.step()

    @property
    def pod(self) -> Pod:
        pod: Pod = self.api.get("pod", POD)
        return pod

    def serving(self) -> str:
        """What the pod is of service with."""
        assert self.fleet.kubelets.in_service(POD)
        return self.fleet.engines[POD].digest


def gave_up(world: World) -> tuple[str, str, int, int, bool] | None:
    """What the agent says that the engine gave up."""
    state: NodeState = world.api.get("state", NODE)
    said = state.engine(POD)
    failed = said.failed if said else None
    return (
        (failed.digest, failed.step, failed.revision, failed.token, failed.booting)
        if failed
        else None
    )


def test_an_engine_boots_prepares_and_commits() -> None:
    world = World()
    world.tell(V0)
    world.go(20)
    assert world.serving() == V0
    assert (world.pod.gate, world.pod.digest_label) == (True, "v0")
    world.tell(V0, prepare=V1, anew=False)
    world.go(10)
    assert world.fleet.engines[POD].prepared == V1
    assert world.serving() == V0
    world.tell(V1)
    world.go(15)
    assert world.serving() == V1
    assert world.fleet.confirmations == {(POD, V0, 0), (POD, V1, 0)}


def test_what_was_given_up_is_tried_again_only_with_another_order() -> None:
    world = World(v1=Flaw("refused"))
    world.tell(V0)
    world.go(20)
    world.tell(V0, prepare=V1, anew=False)
    world.go(10)
    first = gave_up(world)
    assert first == (V1, "Prepare", 1, 1, False)
    tried = world.api.counts["engine refuses to prepare"]
    world.go(60)
    assert world.api.counts["engine refuses to prepare"] == tried == 1
    world.tell(V0, prepare=V1, revision=2, anew=False)
    world.go(10)
    assert world.api.counts["engine refuses to prepare"] == 2
    assert gave_up(world) == (V1, "Prepare", 2, 1, False)


def test_a_commit_that_fails_for_a_passing_reason_is_tried_three_times() -> None:
    for failures, ends_with in ((2, V1), (3, V0)):
        world = World()
        world.tell(V0)
        world.go(20)
        world.fleet.faults.failing_commits[POD] = failures
        world.tell(V1)
        world.go(40)
        assert world.fleet.engines[POD].digest == ends_with
        assert (gave_up(world) is not None) is (failures == 3)


def test_an_engine_that_gave_up_what_it_is_told_prepares_what_comes_next() -> None:
    world = World(v1=Flaw("mismatched"))
    world.tell(V0)
    world.go(20)
    world.tell(V1)
    world.go(30)
    assert gave_up(world) == (V1, "Commit", 1, 2, False)
    assert world.pod.ready, "it serves what it served"
    world.tell(V0)
    world.go(15)
    assert world.serving() == V0


def test_an_engine_that_refuses_at_boot_stays_down_until_it_is_told_another() -> None:
    world = World(v1=Flaw("refused at boot"))
    world.tell(V1)
    world.go(40)
    state: NodeState = world.api.get("state", NODE)
    said = state.engine(POD)
    assert said is not None
    assert said.phase == "Refused"
    assert gave_up(world) == (V1, "Prepare", 1, 1, True)
    assert not world.pod.was_ready
    world.tell(V0)
    world.go(15)
    assert world.serving() == V0


def test_an_engine_that_dies_of_a_version_comes_back_after_ever_longer_waits() -> None:
    world = World(v1=Flaw("crashing", seconds=2.0))
    world.tell(V1)
    world.go(120)
    assert world.pod.restarts >= 3
    assert world.pod.last_run_seconds is not None
    assert world.pod.last_run_seconds < 30
    container = world.fleet.kubelets.containers[POD]
    assert container.crashes > len(BACK_OFF_SECONDS) - 1
    assert world.api.counts["back-off of a container"] >= 2


def test_preparing_may_take_more_memory_than_there_is() -> None:
    world = World(v1=Flaw("killing", oom=True))
    world.tell(V0)
    world.go(20)
    world.tell(V0, prepare=V1, anew=False)
    world.go(8)
    assert world.pod.oom_killed
    assert world.pod.restarts >= 1
    world.tell(V1)  # booting into it takes no second copy
    world.go(30)
    assert world.serving() == V1


def test_a_commit_that_breaks_in_the_middle_is_repaired_to_what_was_served() -> None:
    world = World()
    world.tell(V0)
    world.go(20)
    world.fleet.faults.dirty_commits[POD] = True
    world.tell(V1)
    world.go(30)
    assert world.fleet.engines[POD].digest == V0
    assert gave_up(world) == (V1, "Commit", 1, 2, False)


def test_the_kubelet_follows_the_gate_after_its_lag() -> None:
    world = World()
    world.tell()
    world.go(20)
    container = world.fleet.kubelets.containers[POD]
    container.lag = timedelta(seconds=1.5)
    world.fleet.kubelets.mark(POD, False, "", "label")
    assert world.pod.ready
    world.fleet.agents[NODE] = None  # nobody else marks it
    world.go(1)
    assert world.pod.ready
    world.go(1)
    assert not world.pod.ready
    assert world.pod.ready_since is not None


def test_an_agent_forgets_and_refuses_the_past() -> None:
    world = World(v1=Flaw("refused"))
    world.tell(V0)
    world.go(20)
    world.tell(V0, prepare=V1, anew=False)
    world.go(10)
    world.fleet.kill_agent(NODE)
    world.fleet.start_agent(NODE)
    world.go(15)
    assert world.api.counts["engine refuses to prepare"] == 2  # its memory of that is gone
    world.token = 0
    state: NodeState = world.api.get("state", NODE)
    world.api.put("state", NODE, replace(state, spec=NodeWeightsSpec()))
    world.tell(V1, anew=False)  # token 0: older than what the disk remembers
    world.go(5)
    assert world.serving() == V0
    assert world.api.counts["stale token is refused"] > 0


def test_times_are_those_of_the_node_and_whole_seconds() -> None:
    world = World()
    world.fleet.kubelets.clocks[NODE] = timedelta(seconds=-100)
    world.tell()
    world.go(20)
    world.fleet.kubelets.end_container(POD)
    assert world.pod.engine_started_at == world.fleet.now - timedelta(seconds=100)
    assert world.pod.engine_started_at.microsecond == 0


def test_a_pod_that_terminates_serves_until_it_is_gone() -> None:
    world = World()
    world.tell()
    world.go(20)
    world.fleet.kubelets.terminate(POD)
    world.fleet.kubelets.containers[POD].gone_at = world.fleet.now + timedelta(seconds=5)
    assert world.pod.ready
    assert not world.pod.live
    world.go(6)
    assert world.api.get("pod", POD) is None


def test_the_api_server_takes_nothing_that_is_longer_than_the_schema_allows() -> None:
    api = Api()
    api.put("state", NODE, NodeState(NODE))
    stage = [
        StageItem(digest=f"sha256:{n}", namespace="team", uri="file:///x")
        for n in range(MAX_STAGE + 1)
    ]
    entry = RolloutAssignment(uid="r").model_copy(update={"stage": stage})
    with pytest.raises(Invalid, match=f"stage has {MAX_STAGE + 1}"):
        api.perform(Assign(NODE, "", "r", entry))
    order = PodAssignment(uid=POD, name=POD, namespace="team").model_copy(update={"token": 2**63})
    assert "token is" in excess(RolloutAssignment(uid="r", pods=[order]))
    assert excess(RolloutAssignment(uid="r", stage=stage[:MAX_STAGE])) == ""


def test_a_node_may_refuse_every_write() -> None:
    api = Api()
    api.put("state", NODE, NodeState(NODE))
    api.refusing.add(NODE)
    with pytest.raises(Invalid):
        api.perform(Assign(NODE, "", "r", RolloutAssignment(uid="r")))
    assert api.counts["write is refused as invalid"] == 1


@pytest.mark.parametrize("share", [0, 30, 100])
def test_a_flaw_hits_its_share_of_the_pods_and_always_the_same(share: int) -> None:
    flaw = Flaw("refused", share)
    hit = {uid for uid in map(str, range(1000)) if flaw.hits(uid, V1)}
    assert hit == {uid for uid in map(str, range(1000)) if flaw.hits(uid, V1)}
    assert abs(len(hit) - 10 * share) < 60
