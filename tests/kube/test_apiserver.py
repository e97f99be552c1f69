"""Against a real API server: what tokens say, and a watch that outlives the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
import pytest_asyncio

from hotweights_kube import (
    PODS,
    Api,
    Change,
    Notice,
    Recorder,
    Reference,
    TokenRefused,
    WatchTiming,
    review,
    watch,
)
from hotweights_kube.client import Selection
from hotweights_kube.resources import EVENTS, Resource
from localcluster.controlplane import ControlPlane
from tests.half_open import HalfOpen

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(300, func_only=True)]

CONFIG_MAPS = Resource("v1", "ConfigMap", "configmaps")


@pytest.fixture(scope="module")
def control_plane() -> Iterator[ControlPlane]:
    with ControlPlane() as plane:
        yield plane


@pytest_asyncio.fixture
async def api(control_plane: ControlPlane) -> AsyncIterator[Api]:
    async with await Api.connect(control_plane.kubeconfig, timeout_seconds=30) as api:
        yield api


async def test_a_pod_s_token_names_the_pod_and_another_audience_is_refused(
    api: Api, control_plane: ControlPlane
) -> None:
    spec = {"nodeName": "nowhere", "containers": [{"name": "a", "image": "none"}]}
    metadata = {"name": "p", "namespace": "default"}
    pod = await api.create(
        PODS, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
    )
    bound = {"kind": "Pod", "apiVersion": "v1", "name": "p", "uid": pod["metadata"]["uid"]}
    token = control_plane.service_account_token(
        "default", "default", audiences=["hotweights-agent"], bound_to=bound
    )
    identity = await review(api, token, ["hotweights-agent"])
    assert (identity.namespace, identity.service_account) == ("default", "default")
    assert (identity.pod_name, identity.pod_uid) == ("p", pod["metadata"]["uid"])
    with pytest.raises(TokenRefused):
        await review(api, token, ["hotweights-peer"])
    with pytest.raises(TokenRefused):
        await review(api, "nonsense", ["hotweights-agent"])


async def test_events_are_counted(api: Api) -> None:
    recorder = Recorder(api, "hotweights.dev/test", "test")
    namespace = await api.get(
        Resource("v1", "Namespace", "namespaces", namespaced=False), "default"
    )
    about = Reference("v1", "Namespace", "default", namespace["metadata"]["uid"])
    for _ in range(3):
        await recorder.record(Notice(about, "Tried", "a real event", action="Test"))
    events = (await api.list(EVENTS, Selection("default"))).items
    (event,) = [event for event in events if event["reason"] == "Tried"]
    assert event["series"]["count"] == 3


async def test_a_watch_outlives_the_api_server(api: Api, control_plane: ControlPlane) -> None:
    selection = Selection("default", label_selector="watched=yes")
    body = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "x", "namespace": "default", "labels": {"watched": "yes"}},
    }
    seen: list[Change] = []

    async def follow() -> None:
        async with aclosing(watch(api, CONFIG_MAPS, selection)) as changes:
            async for change in changes:
                seen.append(change)  # noqa: PERF401 - it never ends, and is looked at meanwhile

    task = asyncio.create_task(follow())
    await _until(lambda: "SYNCED" in [change.type for change in seen])
    await api.create(CONFIG_MAPS, body)
    await _until(lambda: [c.body["metadata"]["name"] for c in seen if c.type == "ADDED"] == ["x"])
    await asyncio.to_thread(control_plane.stop_apiserver)
    try:
        await asyncio.sleep(3)
    finally:
        await asyncio.to_thread(control_plane.start_apiserver)
    await api.delete(CONFIG_MAPS, "x", namespace="default")
    # By the watch, or by the list that follows when the API server has forgotten the point: SYNCED
    # comes after it then.
    await _until(lambda: any(change.type == "DELETED" for change in seen))
    assert [c.body["metadata"]["name"] for c in seen if c.type == "DELETED"] == ["x"]
    task.cancel()


async def test_what_happened_while_a_connection_was_silent_is_heard(
    api: Api, control_plane: ControlPlane, tmp_path: Path
) -> None:
    """Nothing ends a half-open connection: its silence alone says that it is dead."""
    selection = Selection("default", label_selector="silent=yes")
    metadata = {"namespace": "default", "labels": {"silent": "yes"}}
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}
    seen: list[Change] = []

    def told(kind: str) -> list[str]:
        return [change.body["metadata"]["name"] for change in seen if change.type == kind]

    await api.create(CONFIG_MAPS, {**body, "metadata": {**metadata, "name": "before"}})
    async with (
        HalfOpen(control_plane, tmp_path) as way,
        await Api.connect(way.kubeconfig, timeout_seconds=5) as behind,
    ):

        async def follow() -> None:
            timing = WatchTiming(silence_seconds=1.0)  # in the product bookmarks have their time
            async with aclosing(watch(behind, CONFIG_MAPS, selection, timing=timing)) as changes:
                async for change in changes:
                    seen.append(change)  # noqa: PERF401 - it never ends

        task = asyncio.create_task(follow())
        await _until(lambda: "SYNCED" in [change.type for change in seen])
        way.silence()
        assert way.silenced_connections
        await api.create(CONFIG_MAPS, {**body, "metadata": {**metadata, "name": "after"}})
        await api.delete(CONFIG_MAPS, "before", namespace="default")
        await _until(lambda: told("DELETED") == ["before"] and "after" in told("ADDED"))
        task.cancel()
    await api.delete(CONFIG_MAPS, "after", namespace="default")


async def _until(question: Callable[[], bool]) -> None:
    async with asyncio.timeout(90):
        while not question():  # noqa: ASYNC110 - what is waited for is a list that a task fills
            await asyncio.sleep(0.05)
