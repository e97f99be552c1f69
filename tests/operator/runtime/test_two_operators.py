"""Two operators' processes on a real API server: one leads; it is killed, stopped and woken, or
ended, and the other goes on. Nothing is lost, nothing is told twice, and the budget holds.
"""

from __future__ import annotations

import asyncio
import math
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from hotweights_crds.nodeweights import NodeWeightsSpec
from hotweights_kube import LEASES, NODE_WEIGHTS, NotFound, watch
from hotweights_kube.client import Selection
from tests.operator.conftest import eventually

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(600, func_only=True)]


class Orders:
    """Every order that ever stood in a NodeWeights: pod → (token, digest), in order."""

    def __init__(self) -> None:
        self.told: dict[str, list[tuple[int, str]]] = {}

    def note(self, spec: NodeWeightsSpec) -> None:
        for order in (pod for entry in spec.rollouts for pod in entry.pods):
            said, known = (order.token, order.digest), self.told.setdefault(order.name, [])
            if said not in known:
                known.append(said)

    def are_told_once(self, digests: list[str]) -> None:
        """Each pod was told these, one after the other, each with a token of its own."""
        for pod, orders in self.told.items():
            assert [digest for _, digest in orders if digest] == digests, (pod, orders)
            tokens = [token for token, _ in orders]
            assert tokens == sorted(set(tokens)), (pod, orders)


@asynccontextmanager
async def following(scene: Any) -> AsyncIterator[Orders]:
    """What is told while this lasts."""
    orders = Orders()

    async def follow() -> None:
        async with aclosing(watch(scene.api, NODE_WEIGHTS, Selection(scene.system))) as changes:
            async for change in changes:
                if change.type in ("ADDED", "MODIFIED"):
                    orders.note(NodeWeightsSpec.from_dict(change.body["spec"]))

    task = asyncio.create_task(follow())
    try:
        yield orders
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def holder(scene: Any) -> str:
    """Who leads by the Lease; empty: nobody."""
    try:
        body = await scene.api.get(LEASES, "hotweights-operator", scene.system)
    except NotFound:
        return ""
    return str(body["spec"].get("holderIdentity") or "")


async def leads(scene: Any, name: str) -> None:
    async def so() -> bool:
        return await holder(scene) == name

    await eventually(so, f"{name} leads", 120, lambda: scene.log() + scene.log("second"))


async def half_way(scene: Any) -> Any:
    """Two operators, of whom the first leads, and of four pods one has changed and one may not yet:
    the second operator.
    """
    await scene.set_up(2)
    scene.start_operator()
    await leads(scene, "operator")
    second = scene.start_another("second")
    for index in range(4):
        await scene.engine_pod(index, index % 2)
    await scene.version("v0")
    await scene.version("v1")
    scene.kubectl.apply(scene.rollout("v0"))
    await scene.reaches("Ready")
    scene.switches_left = 1
    scene.kubectl.apply(scene.rollout("v1"))

    async def one_is_done() -> bool:
        status = await scene.status()
        return (status.revision, status.pods.updated) == (2, 1)

    await eventually(one_is_done, "one pod is updated", 120, scene.log)

    async def stands_by() -> bool:
        return "operator leads; this process stands by" in scene.log("second")

    await eventually(stands_by, "the second one stands by", 120, lambda: scene.log("second"))
    return second


def digests(scene: Any) -> list[str]:
    return [scene.contents[f"file:///models/{name}"] for name in ("v0", "v1")]


async def goes_on(scene: Any) -> None:
    """All pods come to serve the version."""
    scene.switches_left = math.inf
    status = await scene.reaches("Ready")
    assert (status.revision, status.pods.updated, status.pods.failed) == (2, 4, 0)


async def test_the_leader_is_killed_in_the_middle(scene: Any) -> None:
    async with following(scene) as orders:
        await half_way(scene)
        scene.kill_operator()
        await leads(scene, "second")
        assert "operator did not give up" in scene.log("second")
        await goes_on(scene)
    orders.are_told_once(digests(scene))


async def test_a_leader_that_was_stopped_for_longer_than_its_lease_does_nothing(scene: Any) -> None:
    async with following(scene) as orders:
        second = await half_way(scene)
        scene.process.send_signal(signal.SIGSTOP)
        await leads(scene, "second")
        scene.switches_left = 1
        under_way = {pod: len(told) for pod, told in orders.told.items()}
        scene.process.send_signal(signal.SIGCONT)

        async def woke() -> bool:
            return "this process leads no more" in scene.log() and (
                "second leads; this process stands by" in scene.log()
            )

        await eventually(woke, "the first one stands by", 120, scene.log)
        more = sum(len(told) > under_way.get(pod, 0) for pod, told in orders.told.items())
        assert more <= 2, orders.told  # those of the new leader: one that may change, and the next
        await goes_on(scene)
        # who was replaced is as good as any
        second.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(second.wait, 30) == 0
        await leads(scene, "operator")
    orders.are_told_once(digests(scene))


async def test_who_is_ended_gives_up_and_the_other_leads_at_once(scene: Any) -> None:
    async with following(scene) as orders:
        await half_way(scene)
        scene.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(scene.process.wait, 30) == 0, scene.log()
        await leads(scene, "second")
        assert "did not give up" not in scene.log("second")
        await goes_on(scene)
    orders.are_told_once(digests(scene))
