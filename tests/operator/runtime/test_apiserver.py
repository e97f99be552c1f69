"""The operator's process against a real API server: rollouts, crashes, outages, and what the API
server refuses by itself.
"""

from __future__ import annotations

import asyncio
import json
import math
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from hotweights_crds.conditions import find
from hotweights_crds.nodeweights import NodeWeightsSpec, PodAssignment, RolloutAssignment
from hotweights_kube import (
    EVENTS,
    NODE_WEIGHTS,
    NODES,
    WEIGHT_ROLLOUTS,
    WEIGHT_VERSIONS,
    Api,
    Conflict,
    Recorder,
)
from hotweights_kube.client import Selection
from hotweights_kube.resources import Body
from hotweights_operator.model.actions import Assign, CreateNodeWeights
from hotweights_operator.runtime import handlers
from hotweights_operator.runtime.cache import Cache, Kind
from hotweights_operator.runtime.informers import Informers
from hotweights_operator.runtime.perform import Performer
from hotweights_operator.settings import parse
from localcluster.controlplane import ControlPlane
from tests.drift import drift
from tests.half_open import HalfOpen
from tests.operator.conftest import eventually
from tests.operator.kopf_alone import kopf_running

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(600, func_only=True)]


async def entries(scene: Any, node: str) -> dict[str, RolloutAssignment]:
    """The entries in a node's object."""
    body = await scene.api.get(NODE_WEIGHTS, node, scene.system)
    return {entry.uid: entry for entry in NodeWeightsSpec.from_dict(body["spec"]).rollouts}


async def begin(scene: Any, pods: int = 2, nodes: int = 2) -> None:
    await scene.set_up(nodes)
    scene.start_operator()
    for index in range(pods):
        await scene.engine_pod(index, index % nodes)
    await scene.version("v0")
    await scene.version("v1")


async def test_apply_leads_to_ready_and_setting_it_back_too(scene: Any) -> None:
    await begin(scene)
    scene.kubectl.apply(scene.rollout("v0"))
    first = await scene.reaches("Ready")
    assert (first.phase, first.pods.updated, first.pods.ready, first.nodes.summary) == (
        "Complete",
        2,
        2,
        "2/2",
    )

    scene.kubectl.apply(scene.rollout("v1"))
    words = ("wait", "--for=condition=Ready", "wroll/llm", "-n", scene.namespace, "--timeout=120s")
    await asyncio.to_thread(scene.kubectl, *words)
    second = await scene.status()
    assert (second.target.version, second.previous.version, second.rollback) == (
        "v1",
        "v0",
        "Local",
    )
    assert [entry.outcome for entry in second.history] == ["Complete", "Complete"]

    scene.kubectl.apply(scene.rollout("v0"))
    third = await scene.reaches("Ready")
    assert (third.target.version, third.revision) == ("v0", 3)

    events = (await scene.api.list(EVENTS, Selection(scene.namespace))).items
    told = {(event["regarding"]["kind"], event["reason"]) for event in events}
    assert {
        ("WeightRollout", "RevisionStarted"),
        ("WeightRollout", "Complete"),
        ("Pod", "WeightsActivating"),
    } <= told
    shown = scene.kubectl("get", "wroll", "-n", scene.namespace)
    assert "Complete" in shown
    assert "2/2" in shown


async def test_it_leaves_what_users_wrote_as_it_is(scene: Any) -> None:
    """A tool that keeps a repository applied finds no difference, and calls nothing its own."""
    await begin(scene)
    written = scene.rollout("v0")
    scene.kubectl.apply(written)
    await scene.reaches("Ready")
    rollout = await scene.api.get(WEIGHT_ROLLOUTS, "llm", scene.namespace)
    version = await scene.api.get(WEIGHT_VERSIONS, "v0", scene.namespace)
    assert list(drift(written, rollout)) == []
    for body in (rollout, version):
        assert body["status"]
        assert body["metadata"]["generation"] == 1
        assert {"labels", "finalizers", "ownerReferences"}.isdisjoint(body["metadata"])
    scene.kubectl("diff", "-f", "-", text=json.dumps(written))  # fails where there is one
    for node in scene.nodes:
        state = await scene.api.get(NODE_WEIGHTS, node, scene.system)
        assert {"labels", "annotations"}.isdisjoint(state["metadata"]), "by which they count theirs"


async def test_the_operator_is_killed_in_the_middle(scene: Any) -> None:
    await begin(scene, pods=4)
    scene.kubectl.apply(scene.rollout("v0"))
    await scene.reaches("Ready")
    scene.switches_left = 1  # else it may be over before anybody has looked
    scene.kubectl.apply(scene.rollout("v1"))

    async def one_is_done() -> bool:
        status = await scene.status()
        return (status.revision, status.pods.updated) == (2, 1)

    await eventually(one_is_done, "one pod is updated", 120, scene.log)
    scene.kill_operator()
    scene.switches_left = math.inf
    scene.start_operator()
    status = await scene.reaches("Ready")
    assert (status.revision, status.pods.updated) == (2, 4)


async def test_the_api_server_is_away_for_twenty_seconds(
    scene: Any, control_plane: ControlPlane
) -> None:
    await begin(scene)
    scene.kubectl.apply(scene.rollout("v0"))
    await scene.reaches("Ready")
    scene.kubectl.apply(scene.rollout("v1"))
    await asyncio.to_thread(control_plane.stop_apiserver)
    try:
        await asyncio.sleep(20)
    finally:
        await asyncio.to_thread(control_plane.start_apiserver)
    status = await scene.reaches("Ready")
    assert (status.target.version, status.pods.updated) == ("v1", 2)
    assert scene.process.poll() is None


async def test_a_version_that_does_not_exist_is_waited_for(scene: Any) -> None:
    await begin(scene)
    scene.kubectl.apply(scene.rollout("later"))

    async def says_so() -> bool:
        resolved = find((await scene.status()).conditions, "VersionResolved")
        return resolved is not None and (resolved.status, resolved.reason) == ("False", "NotFound")

    await eventually(says_so, "it says that there is none", 120, scene.log)
    await scene.version("later")
    assert (await scene.reaches("Ready")).target.version == "later"


async def test_a_refusal_stalls_and_leaves_everything_serving(scene: Any) -> None:
    await begin(scene)
    scene.kubectl.apply(scene.rollout("v0"))
    await scene.reaches("Ready")
    for node in scene.nodes.values():
        node.refuses = {scene.contents["file:///models/v1"]}
    scene.kubectl.apply(scene.rollout("v1"))
    status = await scene.reaches("Stalled", "ShapeMismatch")
    assert "lm_head.weight" in status.message
    assert (status.pods.available, status.pods.updated) == (2, 0)
    assert all(
        engine.digest == scene.contents["file:///models/v0"]
        for n in scene.nodes.values()
        for engine in n.engines.values()
    )


async def test_a_deleted_rollout_leaves_its_pods_with_what_they_serve(scene: Any) -> None:
    await begin(scene, pods=1, nodes=1)
    scene.kubectl.apply(scene.rollout("v0"))
    await scene.reaches("Ready")
    (node,) = scene.nodes
    before = await entries(scene, node)
    await scene.api.delete(WEIGHT_ROLLOUTS, "llm", namespace=scene.namespace)

    async def unassigned() -> bool:
        return set(await entries(scene, node)) == {"unassigned"}

    await eventually(unassigned, "the pods are nobody's", 120, scene.log)
    after = await entries(scene, node)
    (old,), (new,) = (next(iter(before.values())).pods, after["unassigned"].pods)
    assert new.digest == old.digest == scene.contents["file:///models/v0"]
    assert new.token > old.token
    assert [item.digest for item in after["unassigned"].stage] == [old.digest]


async def test_health_tells_of_the_loop(scene: Any) -> None:
    await begin(scene, pods=1)
    scene.kubectl.apply(scene.rollout("v0"))
    await scene.reaches("Ready")

    def ask(path: str) -> bytes:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{scene.health_port}{path}", timeout=30
        ) as answer:
            content: bytes = answer.read()
            return content

    health = json.loads(await asyncio.to_thread(ask, "/healthz"))
    assert health["synced"] is True
    wanted = (
        'hotweights_rollout_condition{name="llm"',
        'phase="Complete"',
        'hotweights_rollout_duration_seconds_count{outcome="Complete"} 1.0',
    )

    # once the API server has answered the operator, and we may have seen the status before
    async def counted() -> bool:
        metrics = (await asyncio.to_thread(ask, "/metrics")).decode()
        return all(words in metrics for words in wanted)

    await eventually(counted, "the end of the rollout is counted", details=scene.log)


async def test_an_apply_that_was_decided_on_the_past_is_refused(scene: Any, api: Api) -> None:
    await scene.set_up(1)
    (node,) = scene.nodes
    for task in scene.tasks:
        task.cancel()  # nobody else writes there now
    await asyncio.wait(scene.tasks)
    performer = Performer(api, Cache(), Recorder(api, "test", "test"), scene.system)
    uid = (await api.get(NODES, node))["metadata"]["uid"]
    await performer.act(CreateNodeWeights(node, uid))
    seen = performer.cache.get("state", node).resource_version

    def entry(uid: str, token: int) -> RolloutAssignment:
        return RolloutAssignment(
            uid=uid, pods=[PodAssignment(uid="p", name="p", namespace="n", token=token)]
        )

    await performer.act(Assign(node, seen, "a", entry("a", 2)))
    with pytest.raises(Conflict):
        await performer.act(Assign(node, seen, "a", entry("a", 1)))
    assert (await entries(scene, node))["a"].pods[0].token == 2

    current = performer.cache.get("state", node).resource_version
    await performer.act(Assign(node, current, "b", entry("b", 1)))
    current = performer.cache.get("state", node).resource_version
    await performer.act(Assign(node, current, "a", None))
    assert set(await entries(scene, node)) == {"b"}
    current = performer.cache.get("state", node).resource_version
    await performer.act(Assign(node, current, "b", None))
    body = await api.get(NODE_WEIGHTS, node, scene.system)
    assert body["metadata"]["ownerReferences"][0]["name"] == node


async def test_the_rights_that_the_chart_gives_are_enough_in_all_namespaces(
    scene: Any, control_plane: ControlPlane
) -> None:
    await scene.set_up(1)
    await scene.grant()
    scene.start_operator(control_plane.kubeconfig_for(scene.system, "hotweights-operator"))
    await scene.engine_pod(0)
    await scene.version("v0")
    scene.kubectl.apply(scene.rollout("v0"))
    await scene.reaches("Ready")

    async def told() -> bool:  # after the status
        events = (await scene.api.list(EVENTS, Selection(scene.namespace))).items
        return "Complete" in {event["reason"] for event in events}

    await eventually(told, "an event says that it is complete", details=scene.log)


class Heard:
    """What `Informers` tell whoever decides: here it is enough to have heard."""

    def __init__(self) -> None:
        self.cache = Cache()

    def changed(self, kind: Kind, key: str, old: object) -> None:
        pass

    def everything(self) -> None:
        pass


async def test_what_happened_while_the_connections_of_kopf_were_silent_is_heard(
    api: Api, control_plane: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing ends a half-open connection: its silence alone says that it is dead."""
    told = handlers.settings_for_kopf()
    # a bookmark would come within the minute and a half of the product
    told.watching.inactivity_timeout = 1.0
    monkeypatch.setattr(handlers, "settings_for_kopf", lambda: told)
    await api.create(WEIGHT_VERSIONS, weight_version("before"))
    heard = Heard()
    informers = Informers(heard, parse(["--watch-namespace=default"], {}))
    async with HalfOpen(control_plane, tmp_path) as way:
        monkeypatch.setenv("KUBECONFIG", str(way.kubeconfig))
        async with kopf_running(informers, lambda: None), asyncio.timeout(120):
            while not heard.cache.get("version", "default/before"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            way.silence()
            assert way.silenced_connections
            await api.create(WEIGHT_VERSIONS, weight_version("after"))
            await api.delete(WEIGHT_VERSIONS, "before", namespace="default")
            while {one.name for one in heard.cache.values("version")} != {"after"}:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    await api.delete(WEIGHT_VERSIONS, "after", namespace="default")


def weight_version(name: str) -> Body:
    source = {"uri": f"file:///models/{name}"}
    return {
        "apiVersion": WEIGHT_VERSIONS.api_version,
        "kind": "WeightVersion",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"model": "tiny", "version": name, "source": source},
    }
