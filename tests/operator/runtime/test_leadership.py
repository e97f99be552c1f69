"""A process that may lead no more writes nothing, and what it had begun is fenced off by whoever
takes over.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from hotweights_crds.nodeweights import NodeWeightsSpec, PodAssignment, RolloutAssignment
from hotweights_kube import (
    LEASES,
    NODE_WEIGHTS,
    NODES,
    Api,
    Body,
    Conflict,
    Election,
    Forbidden,
    NotFound,
    Recorder,
    Resource,
    Timing,
    Unavailable,
)
from hotweights_operator.model.actions import Assign, CreateNodeWeights
from hotweights_operator.runtime.cache import Cache
from hotweights_operator.runtime.leadership import Fenced, Leadership, NotLeading, fence
from hotweights_operator.runtime.perform import Performer
from tests.operator.conftest import Scene

QUICK = Timing(0.6, 0.4, 0.05)


@dataclass
class Server:
    """A Lease, and whatever else is written."""

    lease: Body | None = None
    version: int = 0
    is_away: bool = False
    hangs: bool = False
    written: list[str] = field(default_factory=list)

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Body:
        await self._answer()
        if self.lease is None:
            raise NotFound(name)
        return self.lease

    async def create(self, resource: Resource, body: Body, *, manager: str = "") -> Body:
        return await self._write(resource, body)

    async def apply(self, resource: Resource, body: Body, *, manager: str) -> Body:
        return await self._write(resource, body)

    async def merge_patch(self, resource: Resource, name: str, patch: Body, **how: Any) -> Body:
        if resource is LEASES and how["resource_version"] != str(self.version):
            raise Conflict(name)
        return await self._write(resource, {"metadata": {"name": name}, **patch})

    async def _answer(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.is_away:
            raise Unavailable("nobody answers")

    async def _write(self, resource: Resource, body: Body) -> Body:
        await self._answer()
        if resource is not LEASES:
            self.written.append(body["metadata"]["name"])
            return body
        self.version += 1
        self.lease = {**body, "metadata": {"resourceVersion": str(self.version)}}
        return self.lease


def process(server: Server, name: str = "a") -> Leadership:
    return Leadership(server, Election(name, QUICK), "system")


async def test_who_cannot_renew_leads_no_more_and_leads_again_when_it_can() -> None:
    server = Server()
    lead = process(server)
    await lead.take()
    server.is_away = True
    await lead.keep()
    assert not lead.leads
    server.is_away = False
    await lead.take()
    assert lead.leads
    assert lead.election.taken_from == "a"


async def test_who_hears_nothing_at_all_leads_no_more_either() -> None:
    server = Server()
    lead = process(server)
    await lead.take()
    server.hangs = True
    await asyncio.wait_for(lead.keep(), 20)
    assert not lead.leads


async def test_the_other_leads_when_it_was_given_up() -> None:
    server = Server()
    first, second = process(server), process(server, "b")
    await first.take()
    waiting = asyncio.create_task(second.take())
    await asyncio.sleep(0)
    await first.release()
    await asyncio.wait_for(waiting, 20)
    assert (first.leads, second.leads, second.election.taken_from) == (False, True, "")


async def test_nothing_is_written_without_the_lead() -> None:
    server = Server()
    lead = process(server)
    fenced = Fenced(server, lead)
    body = {"metadata": {"name": "n"}}
    with pytest.raises(NotLeading, match="Nothing was written"):
        await fenced.apply(NODE_WEIGHTS, body, manager="m")
    await lead.take()
    await fenced.apply(NODE_WEIGHTS, body, manager="m")
    lead.election.resign()
    for write in (
        fenced.create(NODE_WEIGHTS, body),
        fenced.apply(NODE_WEIGHTS, body, manager="m"),
        fenced.merge_patch(NODE_WEIGHTS, "n", {}),
    ):
        with pytest.raises(NotLeading):
            await write
    assert server.written == ["n"]
    assert await fenced.get(LEASES, "l", "system")


async def test_what_is_begun_is_waited_for_until_another_may_lead() -> None:
    server = Server()
    lead = process(server)
    await lead.take()
    server.hangs = True
    with pytest.raises(Unavailable, match="another operator may lead"):
        await Fenced(server, lead).merge_patch(NODE_WEIGHTS, "n", {})
    assert lead.election.safe_seconds(lead.clock()) == 0.0


@dataclass
class Keeper:
    """Nodes that refuse to be marked so often."""

    refusals: dict[str, list[Exception]]
    marked: list[str] = field(default_factory=list)

    def nodes(self) -> list[str]:
        return list(self.refusals)

    async def mark(self, node: str, mark: str) -> None:
        await asyncio.sleep(0)
        if self.refusals[node]:
            raise self.refusals[node].pop(0)
        self.marked.append(node)


async def test_every_node_is_marked_but_those_that_refuse_for_good(
    caplog: pytest.LogCaptureFixture,
) -> None:
    keeper = Keeper({"a": [Unavailable("x")], "b": [Forbidden("a webhook")], "c": [NotFound("c")],
                     "d": []})  # fmt: skip
    await fence(keeper, "me 2", 2)
    assert sorted(keeper.marked) == ["a", "d"]
    assert "node b was not marked: a webhook" in caplog.text


@pytest.mark.apiserver
@pytest.mark.timeout(600, func_only=True)
async def test_what_was_on_its_way_when_another_took_over_is_refused(
    scene: Scene, api: Api
) -> None:
    """However long a write was on its way: it was decided on what stood there before the mark."""
    await scene.set_up(1)
    (node,) = scene.nodes
    performers = [
        Performer(api, Cache(), Recorder(api, "test", name), scene.system) for name in ("old", "new")
    ]
    old, new = performers
    uid = (await api.get(NODES, node))["metadata"]["uid"]
    await old.act(CreateNodeWeights(node, uid))
    body = await api.get(NODE_WEIGHTS, node, scene.system)
    await new.mark(node, "first")  # the new one has it in its cache
    seen = new.cache.get("state", node).resource_version
    order = PodAssignment(uid="p", name="p", namespace="n", token=7, digest="sha256:" + "0" * 64)
    late = Assign(node, seen, "rollout", RolloutAssignment(uid="rollout", pods=[order]))

    await fence(new, "new 2", 4)
    with pytest.raises(Conflict):
        await old.act(late)
    body = await api.get(NODE_WEIGHTS, node, scene.system)
    assert NodeWeightsSpec.from_dict(body["spec"]).rollouts == []
    assert body["metadata"]["generation"] == 1, "no agent has to look"
    assert body["metadata"]["annotations"] == {"hotweights.dev/operator": "new 2"}
