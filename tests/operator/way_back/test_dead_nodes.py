"""A node that dies in the middle of a rollout: its pods are first not Ready, then Terminating for
ever, since no kubelet is there to end them, and others come in their place.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from hotweights_crds.conditions import find
from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_operator.decide.rollouts import decide
from hotweights_operator.model.objects import Node, Rollout
from hotweights_operator.model.observed import Observed
from tests.operator.worlds import (
    AT_NEW,
    NEW,
    NOW,
    OLD,
    engine,
    pod,
    rollout,
    state,
    told_to_change,
    world,
)

DEAD, ALIVE = "n0", "n1"


class Story:
    """Two pods on each of two nodes; p0 serves the new version, and the others have prepared it."""

    def __init__(self) -> None:
        self.now = NOW
        ready = [engine(n, phase="Prepared", prepared=NEW) for n in (1, 2, 3)]
        self.seen: Observed = world(
            [pod(0, DEAD, shows=NEW), pod(1, DEAD), pod(2, ALIVE), pod(3, ALIVE)],
            [
                state(DEAD, [engine(0, NEW), ready[0]], {"p0": NEW, "p1": OLD}),
                state(ALIVE, ready[1:], {"p2": OLD, "p3": OLD}),
            ],
            clock=lambda: self.now,
        )
        self.rollout: Rollout = rollout(
            {**AT_NEW, "preparedRevision": 2}, progressDeadlineSeconds=600
        )

    def dies(self) -> None:
        """As the node controller writes it: the node, and all pods on it."""
        self.seen.put("node", DEAD, Node(DEAD, f"uid-{DEAD}", ready=False))
        for number, shows in ((0, NEW), (1, OLD)):
            known = pod(number, DEAD, shows=shows, ready=False, ready_since=self.now)
            self.seen.put("pod", known.uid, known)

    def evicted(self) -> None:
        """After five minutes; two others are made, and there is no node for them yet."""
        self.now += timedelta(seconds=305)
        for number in (0, 1):
            going = replace(self.seen.pods[f"p{number}"], terminating=True)
            self.seen.put("pod", going.uid, going)
        for number in (4, 5):
            new = pod(number, "", shows="", ready=False, was_ready=False, gate=False)
            self.seen.put("pod", new.uid, new)

    def served(self, *numbers: int) -> None:
        """These serve the new version, on the node that is alive."""
        for number in numbers:
            self.seen.put("pod", f"p{number}", pod(number, ALIVE, shows=NEW))
        told = {f"p{number}": NEW for number in numbers}
        self.seen.put("state", ALIVE, state(ALIVE, [engine(n, NEW) for n in numbers], told))

    def decide(self, seconds: float = 0.0) -> tuple[set[str], WeightRolloutStatus]:
        """After so long: the pods that are told to change, and what is reported."""
        self.now += timedelta(seconds=seconds)
        decision = decide(self.rollout, self.seen, self.now)
        assert decision.status is not None
        self.rollout = replace(self.rollout, status=decision.status)
        return told_to_change(decision), decision.status


def said(status: WeightRolloutStatus) -> dict[str, str]:
    return {failure.pod: failure.reason for failure in status.failures}


def ready(status: WeightRolloutStatus) -> tuple[str, str]:
    found = find(status.conditions, "Ready")
    assert found is not None
    return found.status, found.reason


def test_others_wait_five_minutes_for_pods_of_a_dead_node_and_then_go_on() -> None:
    story = Story()
    story.dies()
    told, status = story.decide()
    assert told == set()
    assert said(status) == {"p0": "NodeNotReady", "p1": "NodeNotReady"}
    told, status = story.decide(299)
    assert told == set()
    told, status = story.decide(1)
    assert told == {"p2"}
    assert status.pods.desired == 4


def test_pods_that_terminate_for_ever_count_no_more_and_hold_up_nobody() -> None:
    story = Story()
    story.dies()
    story.decide()
    story.evicted()
    told, status = story.decide()
    # those that went are not counted beside those that came for them, which are waited for
    assert (status.pods.desired, status.pods.updated) == (4, 0)
    assert said(status) == {"p4": "NotScheduled", "p5": "NotScheduled"}
    assert told == set()
    told, _ = story.decide(300)
    assert told == {"p2"}
    story.served(2, 3, 4, 5)
    story.decide()
    told, status = story.decide(5)
    assert ready(status) == ("True", "Complete")
    assert (told, said(status), status.pods.desired) == (set(), {}, 4)
    assert {"p0", "p1"} <= story.seen.pods.keys(), "they are there all the same"


def test_what_nobody_can_place_ends_in_a_deadline_with_the_reason() -> None:
    story = Story()
    story.dies()
    story.decide()
    story.evicted()
    story.served(2, 3)
    story.decide()
    _, status = story.decide(700)
    assert ready(status) == ("False", "ProgressDeadlineExceeded")
    stalled = find(status.conditions, "Stalled")
    assert stalled is not None
    assert "p4 on no node: NotScheduled" in stalled.message
