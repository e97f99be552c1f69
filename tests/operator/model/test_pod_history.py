"""What is seen: whose word counts, since when a pod is as it is, to whom it belongs; and nothing is
remembered for too long.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from hotweights_crds.nodeweights import Endpoint, NodeWeightsSpec, StagedVersion
from hotweights_operator.decide.rollouts import decide
from hotweights_operator.model.objects import Agent, Node, Pod, Refusal, Rollout
from hotweights_operator.model.observed import Observed
from hotweights_operator.runtime.cache import Cache
from tests.operator.worlds import (
    AT_NEW,
    NEW,
    NOW,
    OLD,
    Fields,
    asked_to_prepare,
    engine,
    order,
    pod,
    prepared,
    rollout,
    state,
    told_to_change,
    version,
    world,
)

ELSEWHERE: Fields = {"target": {"selector": {"matchLabels": {"app": "another"}}}}
OTHER = replace(rollout(AT_NEW, **ELSEWHERE), uid="other", name="other", created_at="2027")


def cluster(**more: Any) -> Observed:
    """A pod that could change at once."""
    return world([pod(0)], [state("n0", prepared(1), {"p0": OLD})], **more)


# -- whose word counts --------------------------------------------------------------------------


def test_an_agent_s_word_counts_while_its_node_and_it_are_ready_and_it_has_spoken() -> None:
    seen = cluster()
    assert seen.follows("n0")
    assert not cluster(agents={"n0": False}).follows("n0")
    assert not cluster(nodes={"n0": Node("n0", "u", ready=False)}).follows("n0")
    assert not cluster(nodes={}).follows("n0")
    known = seen.states["n0"]
    silent = replace(known, status=known.status.model_copy(update={"boot_id": ""}))
    seen.put("state", "n0", silent)
    assert not seen.follows("n0")
    seen.drop("state", "n0", silent)
    assert not seen.follows("n0")


def test_while_an_agent_is_replaced_the_new_one_s_word_counts() -> None:
    seen = cluster()
    seen.put("agent", "going", Agent("going", "n0", False))
    assert seen.follows("n0")
    seen.drop("agent", "n0", Agent("n0", "n0", True))
    assert not seen.follows("n0")
    seen.put("agent", "going", Agent("going", "n0", True))
    assert seen.follows("n0")


def test_an_agent_that_moved_is_on_one_node() -> None:
    seen = cluster()
    seen.put("state", "n1", state("n1"))
    seen.put("node", "n1", Node("n1", "n1"))
    seen.put("agent", "n0", Agent("n0", "n1", True))
    assert (seen.follows("n0"), seen.has_agent("n0"), seen.follows("n1")) == (False, False, True)


def test_peers_are_those_who_serve_now() -> None:
    seen = cluster()
    assert seen.peers() == {"n0"}
    known = seen.states["n0"]
    seen.put("state", "n0", replace(known, status=known.status.model_copy(update={"endpoint": ""})))
    assert seen.peers() == set()
    seen.put("state", "n0", known)
    assert seen.peers() == {"n0"}
    seen.put("agent", "n0", Agent("n0", "n0", False))
    assert seen.peers() == set()


@pytest.mark.parametrize(
    "change",
    [
        {"staged": []},
        {"endpoint": "tcp://n0:2"},
        {"endpoints": [Endpoint(scheme="ucx", endpoint="ucx://n0:3")]},
        {"boot_id": "another"},
    ],
)
def test_what_matters_to_other_nodes_is_news_to_them_and_nothing_else_is(change: Fields) -> None:
    seen = cluster()
    epoch, known = seen.peers_epoch, seen.states["n0"]
    plain = known.status.model_copy(update={"engines": [], "observed_generation": 9})
    seen.put("state", "n0", replace(known, status=plain))
    fetching = [*plain.staged, StagedVersion(digest="sha256:x", phase="Fetching")]
    seen.put("state", "n0", replace(known, status=plain.model_copy(update={"staged": fetching})))
    assert seen.peers_epoch == epoch
    seen.put("state", "n0", replace(known, status=plain.model_copy(update=change)))
    assert seen.peers_epoch > epoch


# -- nothing is remembered for too long ---------------------------------------------------------

RUNNING = rollout(AT_NEW)


def test_a_decision_sees_every_change() -> None:
    seen = cluster()
    idle = state("n0", [engine(0)], {"p0": order("p0", OLD, prepare="")})
    ready = seen.states["n0"]

    def moves(known: Rollout = RUNNING) -> tuple[set[str], set[str]]:
        decision = decide(known, seen, NOW)
        return told_to_change(decision), asked_to_prepare(decision)

    assert moves() == ({"p0"}, set())
    seen.put("state", "n0", idle)
    assert moves() == (set(), {"p0"})
    assert moves(rollout(AT_NEW, paused=True)) == (set(), set())
    seen.put("node", "n0", Node("n0", "uid-n0", ready=False))
    assert moves() == (set(), set())
    seen.put("node", "n0", Node("n0", "uid-n0"))
    seen.put("pod", "p0", pod(0, terminating=True))
    assert moves() == (set(), set())
    seen.put("pod", "p0", pod(0))
    seen.put("state", "n0", ready)
    assert moves() == ({"p0"}, set())
    assert moves(rollout({**AT_NEW, "revision": 3, "preparedRevision": 3, "mostFailed": 1})) == (
        set(),
        set(),
    )
    assert moves(RUNNING) == ({"p0"}, set())


def test_a_pod_that_is_of_service_no_more_is_counted_so_at_once() -> None:
    seen = cluster()
    for ready in (True, False, True):
        seen.put("pod", "p0", pod(0, ready=ready))
        status = decide(RUNNING, seen, NOW).status
        assert status is not None
        assert status.pods.available == ready


def test_a_pod_is_known_as_it_is_now() -> None:
    seen = cluster()
    for known in (pod(0, gate=False), pod(0, ready=False), pod(0, "n1")):
        seen.target("p0")
        seen.put("pod", "p0", known)
        assert seen.target("p0").pod is known


def test_what_is_counted_is_counted_for_the_version_of_now() -> None:
    seen = cluster()
    back = rollout(
        {"revision": 3, "target": {"digest": OLD}, "stable": {"digest": OLD}},
        versionRef={"name": "old"},
    )
    for known, updated in ((RUNNING, 0), (back, 1), (RUNNING, 0)):
        status = decide(known, seen, NOW).status
        assert status is not None
        assert status.pods.updated == updated


def test_what_is_gone_is_forgotten() -> None:
    seen = cluster()
    decide(RUNNING, seen, NOW)
    seen.refusals["r", "n0"] = Refusal("Invalid", "no")
    seen.refusals["another", "n0"] = Refusal("Invalid", "no")
    seen.drop("rollout", "r", RUNNING)
    assert set(seen.refusals) == {("another", "n0")}
    assert [known for known in seen.interned if known[1] == "r"] == []
    assert set(seen.entered("r")) == {"n0"}
    known = seen.states["n0"]
    seen.put("state", "n0", replace(known, spec=NodeWeightsSpec()))
    assert set(seen.entered("r")) == set()


# -- since when ---------------------------------------------------------------------------------


def watched(*pods: Pod) -> Any:
    """What is known of a pod that is seen so at one minute after the other."""
    now = NOW
    seen = Observed(clock=lambda: now)
    for each in pods:
        seen.put("pod", "p0", each)
        now += timedelta(minutes=1)
    return seen.target("p0").seen


def minute(number: int) -> datetime:
    """That one."""
    return NOW + timedelta(minutes=number)


def test_a_pod_is_as_it_is_since_it_last_changed_what_it_shows() -> None:
    same = pod(0, labels={**pod(0).labels, "note": "x"})
    assert watched(pod(0), same, pod(0)).shown_since == NOW
    for other in (pod(0, ready=False), pod(0, gate=False), pod(0, shows=NEW), pod(0, restarts=1)):
        assert watched(pod(0), other).shown_since == minute(1)
        assert watched(pod(0), other, pod(0)).shown_since == minute(2)


def test_a_pod_is_of_no_service_since_it_first_was() -> None:
    unready = pod(0, ready=False)
    assert watched(pod(0), unready, replace(unready, restarts=2), unready).unready_since == minute(
        1
    )
    assert watched(unready, pod(0)).unready_since is None
    assert watched(unready, pod(0), unready).unready_since == minute(2)


def test_a_life_is_of_service_since_it_first_was_and_the_next_one_anew() -> None:
    unready, again = pod(0, ready=False), pod(0, restarts=1)
    assert watched(unready).served_since is None
    assert watched(unready, pod(0), unready, pod(0)).served_since == minute(1)
    assert watched(pod(0), replace(again, ready=False)).served_since is None
    assert watched(pod(0), replace(again, ready=False), again).served_since == minute(2)


# -- to whom a pod belongs ----------------------------------------------------------------------


def owner(seen: Observed, uid: str = "p0") -> str:
    """A pod's rollout."""
    found = seen.owners.owner(uid)
    return found.uid if found else ""


def test_a_pod_belongs_to_the_oldest_rollout_that_selects_it_now() -> None:
    older = replace(RUNNING, uid="older", name="older", created_at="2025")
    seen = cluster()
    assert owner(seen) == "r"
    seen.put("rollout", "", older)
    assert owner(seen) == "older"
    seen.put("rollout", "", replace(older, terminating=True))
    assert owner(seen) == "r"
    seen.put("rollout", "", older)
    seen.drop("rollout", "", older)
    assert owner(seen) == "r"
    seen.put("rollout", "", OTHER)
    seen.put("pod", "p0", replace(pod(0), labels={"app": "another"}))
    assert owner(seen) == "other"
    seen.put("pod", "p0", replace(pod(0), labels={}))
    assert owner(seen) == ""


def test_a_rollout_s_pods_are_those_that_live_and_stand_where_they_stand_now() -> None:
    seen = cluster()

    def pods() -> dict[str, list[str]]:
        return seen.owners.pods_by_node("r")

    seen.put("pod", "p1", pod(1, ""))
    assert pods() == {"": ["p1"], "n0": ["p0"]}
    seen.put("pod", "p1", pod(1, "n1"))
    assert pods() == {"n0": ["p0"], "n1": ["p1"]}
    assert [known.uid for known in seen.owners.pods_on("")] == []
    seen.put("pod", "p0", pod(0, terminating=True))
    assert pods() == {"n1": ["p1"]}
    seen.drop("pod", "p1", pod(1, "n1"))
    assert pods() == {}


# -- versions, and names that come again --------------------------------------------------------


def test_versions_are_known_by_what_they_are_now() -> None:
    seen = cluster(versions=[version("v", "")])
    catalog = seen.version_index
    assert set(catalog.unresolved) == {"uid-models-v"}
    epoch = catalog.epoch
    seen.put("version", "", version("v", OLD))
    assert (set(catalog.unresolved), catalog.epoch > epoch) == (set(), True)
    seen.put("version", "", version("v", NEW))
    assert catalog.of_digest("models", OLD) is None
    assert catalog.of_digest("models", NEW) is not None
    seen.drop("version", "", version("v", NEW))
    assert (catalog.of_digest("models", NEW), catalog.named("models", "v"), seen.versions) == (
        None,
        None,
        {},
    )


def test_an_object_made_anew_under_its_name_is_another_one() -> None:
    cache = Cache()
    cache.put("rollout", "models/llm", 1, RUNNING)
    cache.put("rollout", "models/llm", 2, replace(RUNNING, uid="r2"))
    assert set(cache.observed().rollouts) == {"r2"}


def test_a_deletion_that_comes_late_is_of_the_one_before() -> None:
    cache = Cache()
    cache.put("rollout", "models/llm", 5, RUNNING)
    assert not cache.drop("rollout", "models/llm", 4)
    assert set(cache.observed().rollouts) == {"r"}
    assert cache.drop("rollout", "models/llm", 6)
    assert not cache.put("rollout", "models/llm", 5, RUNNING)
