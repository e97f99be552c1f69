"""Writes: fenced, under the right manager, read back into the cache, and told of only when they
happened.
"""

from __future__ import annotations

from typing import Any

import pytest

from hotweights_crds.nodeweights import ResolveItem, RolloutAssignment
from hotweights_crds.weightrollout import WeightRolloutSpec, WeightRolloutStatus
from hotweights_kube import Conflict, NotFound, Recorder, Unavailable
from hotweights_kube.resources import Body, Resource
from hotweights_operator.model.actions import (
    AskResolve,
    Assign,
    CreateNodeWeights,
    Event,
    ObjectRef,
)
from hotweights_operator.model.objects import NodeState, Rollout
from hotweights_operator.runtime.cache import Cache
from hotweights_operator.runtime.perform import Performer


class Server:
    """Remembers what was written; raises what it is told to."""

    def __init__(self) -> None:
        self.written: list[tuple[str, Body, str]] = []
        self.error: Exception | None = None
        self.there = True
        self.answer: Body = {}

    def _answer(self, verb: str, body: Body, manager: str) -> Body:
        if self.error is not None:
            raise self.error
        self.written.append((verb, body, manager))
        metadata = {**body.get("metadata", {}), "resourceVersion": "9", "uid": "u"}
        return {"spec": {}, **body, "metadata": metadata, **self.answer}

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Body:
        if not self.there:
            raise NotFound("gone")
        return {
            "metadata": {"name": name, "namespace": namespace, "resourceVersion": "8", "uid": "u"},
            "spec": {},
        }

    async def create(self, resource: Resource, body: Body, *, manager: str = "") -> Body:
        return self._answer(f"create {resource.kind}", body, manager)

    async def apply(self, resource: Resource, body: Body, *, manager: str) -> Body:
        return self._answer("apply", body, manager)

    async def merge_patch(self, resource: Resource, name: str, patch: Body, **options: Any) -> Body:
        spec = {"versionRef": {"name": "v"}, "target": {"selector": {"matchLabels": {"a": "b"}}}}
        metadata = {"name": name, "namespace": options["namespace"]}
        body = self._answer(
            f"patch {options.get('subresource')} {options.get('resource_version')}",
            {**patch, "metadata": metadata},
            "",
        )
        return {**body, "spec": spec}


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def performer(server: Server) -> Performer:
    cache = Cache()
    cache.put("state", "n", 7, NodeState("n", resource_version="7"))
    return Performer(server, cache, Recorder(server, "hotweights.dev/operator", "pod"), "system")


EVENT = Event(ObjectRef("Pod", "models", "p", "u"), "WeightsActivating", "now")
ASSIGN = Assign("n", "7", "r1", RolloutAssignment(uid="r1"), (EVENT,))


async def test_an_assignment_is_applied_under_the_rollout_s_manager_and_fenced(
    server: Server, performer: Performer
) -> None:
    await performer.act(ASSIGN)
    verb, body, manager = server.written[0]
    assert (verb, manager) == ("apply", "hotweights-rollout-r1")
    assert body["metadata"] == {"name": "n", "namespace": "system", "resourceVersion": "7"}
    assert body["spec"]["rollouts"][0]["uid"] == "r1"
    assert performer.cache.get("state", "n").resource_version == "9"
    assert server.written[1][0] == "create Event"


async def test_taking_out_says_an_empty_list(server: Server, performer: Performer) -> None:
    item = ResolveItem(uid="v", namespace="a", name="b", model="m", version="v", uri="file:///x")
    for action in (
        Assign("n", "7", "r1", None),
        AskResolve("n", "7", "v", item),
        AskResolve("n", "7", "v", None),
    ):
        await performer.act(action)
    specs = [body["spec"] for _, body, _ in server.written]
    assert specs[0] == {"rollouts": []}
    assert specs[1]["resolve"][0]["uri"] == "file:///x"
    assert specs[2] == {"resolve": []}


async def test_a_new_object_belongs_to_its_node_and_to_no_rollout(
    server: Server, performer: Performer
) -> None:
    await performer.act(CreateNodeWeights("n2", "node-uid"))
    _, body, manager = server.written[0]
    assert manager == "hotweights-nodes"
    assert body["metadata"]["ownerReferences"][0] == {
        "apiVersion": "v1",
        "kind": "Node",
        "name": "n2",
        "uid": "node-uid",
    }
    assert body["spec"] == {"nodeName": "n2"}


async def test_a_conflict_is_read_again_and_nobody_is_told(
    server: Server, performer: Performer
) -> None:
    server.error = Conflict("changed")
    with pytest.raises(Conflict):
        await performer.act(ASSIGN)
    assert performer.cache.get("state", "n").resource_version == "8"
    assert server.written == []


async def test_an_object_that_is_gone_is_forgotten(server: Server, performer: Performer) -> None:
    server.error, server.there = NotFound("gone"), False
    with pytest.raises(NotFound):
        await performer.act(ASSIGN)
    assert performer.cache.get("state", "n") is None


async def test_an_outage_leaves_the_cache_alone(server: Server, performer: Performer) -> None:
    server.error = Unavailable("away")
    with pytest.raises(Unavailable):
        await performer.act(ASSIGN)
    assert performer.cache.get("state", "n").resource_version == "7"


async def test_a_status_is_fenced_and_read_back(server: Server, performer: Performer) -> None:
    spec = WeightRolloutSpec.from_dict(
        {"versionRef": {"name": "v"}, "target": {"selector": {"matchLabels": {"a": "b"}}}}
    )
    rollout = Rollout("u", "r", "models", 1, "7", "", spec)
    await performer.write_rollout(rollout, WeightRolloutStatus(phase="Staging"))
    assert server.written[0][0] == "patch status 7"
    assert performer.cache.get("rollout", "models/r").status.phase == "Staging"


async def test_an_answer_of_another_release_changes_nothing_that_is_known(
    server: Server, performer: Performer
) -> None:
    server.answer = {"spec": {"rollouts": "a text"}}
    await performer.act(ASSIGN)
    assert performer.cache.get("state", "n").resource_version == "7"


async def test_a_status_that_was_decided_on_the_past_is_read_again(
    server: Server, performer: Performer
) -> None:
    spec = WeightRolloutSpec.from_dict(
        {"versionRef": {"name": "v"}, "target": {"selector": {"matchLabels": {"a": "b"}}}}
    )
    rollout = Rollout("u", "r", "models", 1, "7", "", spec)
    performer.cache.put("rollout", "models/r", 7, rollout)
    server.error, server.there = Conflict("changed"), False
    with pytest.raises(Conflict):
        await performer.write_rollout(rollout, WeightRolloutStatus(phase="Staging"))
    assert performer.cache.get("rollout", "models/r") is None


async def test_a_request_is_its_version_s_own(server: Server, performer: Performer) -> None:
    await performer.act(AskResolve("n", "7", "v1", None))
    assert server.written[0][2] == "hotweights-version-v1"


async def test_what_depends_on_our_own_write_hears_of_it(
    server: Server, performer: Performer
) -> None:
    told: list[tuple[str, str]] = []
    performer.wrote = lambda kind, key, old: told.append((kind, key))
    await performer.act(ASSIGN)
    assert told == [("state", "n")]


@pytest.mark.parametrize("warning", [True, False])
async def test_a_warning_is_one(server: Server, performer: Performer, warning: bool) -> None:
    await performer.tell(
        [Event(ObjectRef("Pod", "models", "p", "u"), "ProbeMismatch", "m", warning)]
    )
    assert server.written[0][1]["type"] == ("Warning" if warning else "Normal")
