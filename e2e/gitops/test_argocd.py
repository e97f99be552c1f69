"""A repository, Argo CD, and the operator: what people who merge a new version see, and that none of
the three undoes what another has done.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from e2e.gitops.argocd import ArgoCD, Body, Repository
from hotweights_kube import WEIGHT_ROLLOUTS, WEIGHT_VERSIONS
from tests.operator.conftest import Scene, eventually

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(1500, func_only=True)]
COMMAND = "hotweights.dev/command"
WAVE = "argocd.argoproj.io/sync-wave"
HELD_SECONDS = 6.0  # some reconciliations of an Application that is asked to look again


class World:
    """An Application that follows a repository, in a namespace whose pods the operator looks after."""

    def __init__(self, scene: Scene, argocd: ArgoCD, folder: Path) -> None:
        self.scene, self.argocd = scene, argocd
        self.repository = Repository(folder / "repository")
        self.name = scene.namespace

    async def begin(self) -> None:
        """Everything serves v0, and Argo CD says so."""
        await self.scene.set_up(2)
        self.scene.start_operator()
        for index in range(2):
            await self.scene.engine_pod(index, index)
        self.commit("Serve v0", self.rollout("v0"), self.version("v0"))
        self.argocd.follow(self.name, self.repository, self.scene.namespace)
        await self.until("Healthy")

    def version(self, name: str) -> Body:
        """A WeightVersion, before the rollouts in each sync."""
        uri = f"file:///models/{name}"
        self.scene.contents[uri] = "sha256:" + f"{sum(map(ord, name)):064x}"
        return {
            "apiVersion": WEIGHT_VERSIONS.api_version,
            "kind": "WeightVersion",
            "metadata": {"name": name, "annotations": {WAVE: "0"}},
            "spec": {"model": "tiny", "version": name, "source": {"uri": uri}},
        }

    def rollout(self, version: str, **spec: Any) -> Body:
        """The WeightRollout, after the versions."""
        body = self.scene.rollout(version, **spec)
        body["metadata"]["annotations"] = {WAVE: "1"}
        del body["metadata"]["namespace"]
        return body

    def commit(self, subject: str, *bodies: Body) -> None:
        """To the main branch."""
        files = {body["metadata"]["name"]: body for body in bodies}
        self.head = self.repository.commit(subject, **files)

    async def push(self, subject: str, *bodies: Body) -> None:
        """Commit, and tell Argo CD."""
        self.commit(subject, *bodies)
        await asyncio.to_thread(self.argocd.refresh, self.name)

    async def until(self, status: str, message: str = "") -> Body:
        """Argo CD has synced the newest commit and says this of it."""
        return await asyncio.to_thread(
            self.argocd.until, self.name, status, revision=self.head, message=message
        )

    async def live(self) -> Body:
        """The rollout as the cluster has it."""
        found: Body = await self.scene.api.get(WEIGHT_ROLLOUTS, "llm", self.scene.namespace)
        return found


@pytest_asyncio.fixture
async def world(scene: Scene, argocd: ArgoCD, tmp_path: Path) -> AsyncIterator[World]:
    made = World(scene, argocd, tmp_path)
    await made.begin()
    yield made
    await asyncio.to_thread(argocd.forget, made.name)


async def test_a_merged_version_progresses_and_is_healthy_when_every_pod_serves_it(
    world: World,
) -> None:
    world.scene.switches_left = 1
    await world.push("Serve v1", world.rollout("v1"), world.version("v1"))
    await world.until("Progressing", "1 of 2 pods serve v1")
    world.scene.switches_left = math.inf
    await world.until("Healthy", "all 2 pods serve v1")
    status = await world.scene.status()
    assert (status.target.version, status.pods.updated, status.pods.ready) == ("v1", 2, 2)
    assert world.argocd.knows(world.name, "v1", "Healthy")


async def test_a_version_that_pods_refuse_is_degraded_and_says_why(world: World) -> None:
    bad = world.version("bad")
    for node in world.scene.nodes.values():
        node.refuses.add(world.scene.contents[bad["spec"]["source"]["uri"]])
    await world.push("Serve a bad version", world.rollout("bad"), bad)
    await world.until("Degraded", "ShapeMismatch: lm_head.weight is (2, 3), the model has (2, 4)")
    assert {"retry", "rollback"} <= await asyncio.to_thread(world.argocd.actions, world.name)
    await world.push("Serve v0 again", world.rollout("v0"))
    await world.until("Healthy", "all 2 pods serve v0")


async def test_what_git_pauses_is_suspended(world: World) -> None:
    await world.push("Wait with v1", world.rollout("v1", paused=True), world.version("v1"))
    await world.until("Suspended", "paused by spec.paused")
    await world.push("Serve v1", world.rollout("v1"))
    await world.until("Healthy", "all 2 pods serve v1")


async def test_self_healing_undoes_nothing_that_operator_and_people_have_done(world: World) -> None:
    world.scene.switches_left = 0
    await world.push("Serve v1", world.rollout("v1"), world.version("v1"))
    found = await world.until("Progressing", "0 of 2 pods serve v1")
    syncs = len(found["history"])
    assert "pause" in await asyncio.to_thread(world.argocd.actions, world.name)
    await asyncio.to_thread(world.argocd.act, world.name, "pause")
    revision = (await world.scene.status()).revision
    command = (await world.live())["metadata"]["annotations"][COMMAND]
    assert command.startswith(f"pause {revision} ")

    loop = asyncio.get_running_loop()
    end = loop.time() + HELD_SECONDS
    while loop.time() < end:
        await asyncio.to_thread(world.argocd.refresh, world.name)
        await asyncio.sleep(1)
        assert (await world.live())["metadata"]["annotations"][COMMAND] == command
    world.scene.switches_left = math.inf
    await world.push("Serve v0 again", world.rollout("v0"))
    found = await world.until("Healthy", "all 2 pods serve v0")
    assert len(found["history"]) == syncs + 1, "it has synced again, though nothing was merged"


async def test_self_healing_sets_back_what_somebody_changed_beside_git(world: World) -> None:
    patch = json.dumps({"spec": {"versionRef": {"name": "none"}}})
    words = ("patch", "wroll/llm", "-n", world.scene.namespace, "--type=merge", f"--patch={patch}")
    world.scene.kubectl(*words)

    async def healed() -> bool:
        return bool((await world.live())["spec"]["versionRef"]["name"] == "v0")

    await eventually(healed, "Git is right", 120)
    await world.until("Healthy", "all 2 pods serve v0")


async def test_versions_come_before_the_rollouts_that_name_them(world: World) -> None:
    """A source that cannot be read keeps the rollout as it is: the wave before it is not healthy."""
    lost = world.version("lost")
    del world.scene.contents[lost["spec"]["source"]["uri"]]
    await world.push("Serve a version that nobody can read", world.rollout("lost"), lost)

    async def unreadable() -> bool:
        return await asyncio.to_thread(world.argocd.knows, world.name, "lost", "Degraded")

    await eventually(unreadable, "the version is known for broken", 120)
    assert (await world.live())["spec"]["versionRef"]["name"] == "v0"
    assert (await world.scene.status()).phase == "Complete"
