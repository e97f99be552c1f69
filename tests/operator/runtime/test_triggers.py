"""Wake-ups: whoever would decide otherwise now is looked at, and what an event wakes does not grow
with the cluster.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hotweights_crds.nodeweights import NodeWeightsSpec, ResolvedVersion, ResolveItem
from hotweights_operator.model.objects import Agent, Node, NodeState
from hotweights_operator.model.observed import Kind, Observed
from hotweights_operator.runtime import triggers
from tests.operator.worlds import (
    AT_NEW,
    NEW,
    OLD,
    Fields,
    engine,
    pod,
    rollout,
    state,
    version,
    world,
)

MINE, THEIRS = ("rollout", "models/llm"), ("rollout", "models/other")
NODE, VERSION, WAITING = ("node", "n0"), ("version", "models/new"), ("version", "models/later")
ELSEWHERE: Fields = {"target": {"selector": {"matchLabels": {"app": "another"}}}}
LATER = version("later", "")
OTHER = replace(rollout(AT_NEW, **ELSEWHERE), uid="other", name="other", created_at="2027")


def cluster() -> Observed:
    """A pod of one of two rollouts on a node, another node, and a version that waits to be read."""
    versions = [version("old", OLD), version("new", NEW), LATER]
    known = state("n0", [engine(0)], {"p0": OLD})
    return world(
        [pod(0)], [known, state("n1")], rollouts=[rollout(AT_NEW), OTHER], versions=versions
    )


def woken(seen: Observed, kind: Kind, old: Any, new: Any, key: str = "") -> set[triggers.Key]:
    """By this change."""
    if new is None:
        seen.drop(kind, key, old)
    else:
        seen.put(kind, key, new)
    return triggers.affected(kind, old, new, seen)


def asking(known: NodeState, *uids: str) -> NodeState:
    """The node, asked to read these versions."""
    items = [
        ResolveItem(uid=u, namespace="models", name="x", model="m", version="v", uri="file:///x")
        for u in uids
    ]
    return replace(known, spec=known.spec.model_copy(update={"resolve": items}))


def test_what_an_agent_says_wakes_its_node_and_the_rollouts_there_and_nobody_else() -> None:
    seen = cluster()
    known = seen.states["n0"]
    status = known.status.model_copy(update={"engines": []})
    assert woken(seen, "state", known, replace(known, status=status)) == {MINE, NODE}
    seen.put("pod", "p9", pod(9, "n1"))
    bare = seen.states["n1"]
    assert woken(seen, "state", bare, replace(bare, resource_version="51")) == {
        MINE,
        ("node", "n1"),
    }
    seen.drop("pod", "p9", pod(9, "n1"))
    other = seen.states["n1"]
    assert woken(seen, "state", other, replace(other, resource_version="51")) == {("node", "n1")}


def test_an_entry_that_somebody_took_out_wakes_its_rollout() -> None:
    known = state("n1", [], {"p7": OLD}, "other")
    seen = cluster()
    seen.put("state", "n1", known)
    assert THEIRS in woken(seen, "state", known, replace(known, spec=NodeWeightsSpec()))


def test_an_answer_wakes_its_version() -> None:
    seen = cluster()
    asked = asking(seen.states["n1"], LATER.uid)
    found = asked.status.model_copy(
        update={"resolved": [ResolvedVersion(uid=LATER.uid, digest=OLD)]}
    )
    assert WAITING in woken(seen, "state", asked, replace(asked, status=found))


def test_an_agent_that_begins_to_speak_or_has_room_again_wakes_the_versions_that_wait() -> None:
    seen = cluster()
    known = seen.states["n1"]
    silent = replace(known, status=known.status.model_copy(update={"boot_id": ""}))
    assert WAITING in woken(seen, "state", silent, known)
    assert WAITING in woken(seen, "state", asking(known, "a", "b"), asking(known, "a"))
    assert WAITING not in woken(seen, "state", asking(known, "a"), asking(known, "a"))


@pytest.mark.parametrize("gone", [True, False])
def test_a_node_and_its_agent_wake_what_depends_on_them(gone: bool) -> None:
    seen = cluster()
    before, after = Node("n0", "uid-n0"), None if gone else Node("n0", "uid-n0", ready=False)
    assert woken(seen, "node", before, after) == {MINE, NODE, WAITING}
    agent, other = Agent("n0", "n0", True), None if gone else Agent("n0", "n0", False)
    assert woken(seen, "agent", agent, other, "n0") == {MINE, NODE, WAITING}


def test_an_agent_that_moves_wakes_both_nodes() -> None:
    seen = cluster()
    assert {NODE, ("node", "n1")} <= woken(
        seen, "agent", Agent("n0", "n0", True), Agent("n0", "n1", True), "n0"
    )


def test_a_pod_wakes_its_node_and_whoever_selects_or_selected_it_or_has_it_in_an_entry() -> None:
    seen = cluster()
    before, lost = pod(0), replace(pod(0), labels={"app": "another"})
    assert woken(seen, "pod", before, lost) == {MINE, THEIRS, NODE}
    assert woken(seen, "pod", lost, replace(lost, labels={})) == {MINE, THEIRS, NODE}
    assert woken(seen, "pod", replace(lost, labels={}), replace(lost, labels={}, ready=False)) == {
        MINE,
        NODE,
    }
    assert woken(seen, "pod", None, replace(pod(1, "n1"), labels={})) == {("node", "n1")}
    assert woken(seen, "pod", None, replace(pod(2, ""), labels={})) == set()


def test_a_version_wakes_itself_the_rollouts_that_name_it_and_the_nodes_that_read_it() -> None:
    seen = cluster()
    seen.put("state", "n1", asking(seen.states["n1"], "uid-models-new"))
    known = version("new", NEW)
    assert woken(seen, "version", version("new", ""), known) == {
        VERSION,
        MINE,
        THEIRS,
        ("node", "n1"),
    }
    assert MINE in woken(seen, "version", None, version("new", "sha256:x"))
    seen.put("state", "n1", asking(seen.states["n1"], LATER.uid))
    assert woken(seen, "version", LATER, None) == {WAITING, ("node", "n1")}


def test_a_version_that_a_rollout_could_go_back_to_wakes_it() -> None:
    seen = cluster()
    assert MINE in woken(seen, "version", version("old", OLD), None)
    assert woken(seen, "version", None, version("x", "sha256:x")) == {("version", "models/x")}


def test_a_rollout_that_changes_wakes_itself_and_one_that_comes_or_goes_all_whom_it_may_concern() -> (
    None
):
    seen = cluster()
    known = rollout(AT_NEW)
    assert woken(seen, "rollout", known, replace(known, generation=4)) == {MINE}
    going = replace(known, terminating=True)
    assert woken(seen, "rollout", known, going) == {MINE, THEIRS, NODE}
    assert woken(seen, "rollout", going, None) == {MINE, THEIRS, NODE}
    assert woken(seen, "rollout", None, known) == {MINE, THEIRS, NODE}


def test_everything_is_everything() -> None:
    old = ("version", "models/old")
    assert triggers.everything(cluster()) == {
        MINE,
        THEIRS,
        NODE,
        ("node", "n1"),
        VERSION,
        WAITING,
        old,
    }
