"""What an agent is told of its node's pods, in the namespaces that it may look into."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from hotweights_agent.kube.pod_status import PodStatusWriter
from hotweights_agent.kube.status_writer import StatusWriter
from hotweights_agent.kube.sync import KubeSync
from hotweights_agent.session.messages import Message, PodsPresent
from hotweights_kube import PODS, Body, Selection
from hotweights_kube.client import Listing
from hotweights_kube.resources import Resource
from tests.agent.fake_engine import until


class Api:
    """Lists a pod in each namespace; one of them answers later."""

    def __init__(self) -> None:
        self.asked: list[Selection] = []
        self.late = asyncio.Event()

    async def pages(
        self, resource: Resource, selection: Selection | None = None
    ) -> AsyncGenerator[Listing, None]:
        if resource is not PODS or selection is None:
            yield Listing([], "1")
            return
        self.asked.append(selection)
        if selection.namespace == "late":
            await self.late.wait()
        name = str(selection.namespace)
        metadata = {"name": "p", "namespace": name, "uid": name, "resourceVersion": "1"}
        yield Listing([{"metadata": metadata}], "1")

    async def stream(self, *_: Any, silence_seconds: float) -> AsyncGenerator[Body, None]:
        await asyncio.Event().wait()
        yield {}


async def nothing(*_: Any) -> Any:
    return {}


async def test_pods_are_told_of_when_every_namespace_was_listed() -> None:
    """Those of one that is still to come would seem to be gone."""
    api, told = Api(), list[Message]()

    async def tell(message: Message) -> None:
        told.append(message)

    clock = asyncio.get_running_loop().time
    pods = PodStatusWriter(nothing, nothing, clock, str)
    status = StatusWriter(nothing, clock, str)
    watched: Any = api
    sync = KubeSync(watched, "node", "system", tell, status, pods, namespaces=("soon", "late"))
    task = asyncio.create_task(sync.run())
    try:
        await until(lambda: pods.present == {"soon"} and len(api.asked) == 2)
        assert told == []
        api.late.set()
        await until(lambda: told == [PodsPresent(frozenset({"soon", "late"}))])
        assert {one.field_selector for one in api.asked} == {"spec.nodeName=node"}
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
