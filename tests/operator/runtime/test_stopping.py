"""SIGTERM ends the operator's process by itself, also when its rights went before it, as `helm
uninstall` does, and when nobody answers.

Nothing else ends it: what an API server refuses today it may grant tomorrow.
"""

from __future__ import annotations

import asyncio
import signal
import time
import urllib.request
from typing import Any

import pytest

from localcluster.controlplane import ControlPlane
from tests.operator.conftest import eventually

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(600, func_only=True)]

GRACE_SECONDS = 30.0  # what a pod has; then nobody asks any more


async def serving(scene: Any) -> None:
    """Wait until the operator follows everything, if only there is nothing to follow."""

    def ask() -> bool:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{scene.health_port}/readyz", timeout=5
            ) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    await eventually(lambda: asyncio.to_thread(ask), "it is ready", 120, scene.log)


async def heard(scene: Any, words: str) -> None:
    """Wait until the operator's log has these words."""

    async def said() -> bool:
        return words in scene.log()

    await eventually(said, words, 120, scene.log)


async def ends(scene: Any) -> None:
    """It ends within its grace, and says that all was well."""
    began = time.monotonic()
    scene.process.send_signal(signal.SIGTERM)
    code = await asyncio.to_thread(scene.process.wait, GRACE_SECONDS)
    print(f"ended {time.monotonic() - began:.1f} s after SIGTERM")
    assert code == 0, scene.log()
    assert "Traceback" not in scene.log()


async def test_it_ends_while_all_is_well(scene: Any) -> None:
    await scene.set_up(1)
    scene.start_operator()
    await scene.engine_pod(0)
    await scene.version("v0")
    scene.kubectl.apply(scene.rollout("v0"))
    await scene.reaches("Ready")
    await ends(scene)


async def test_it_ends_without_its_rights(scene: Any, control_plane: ControlPlane) -> None:
    await scene.set_up(1)
    rights = await scene.grant()
    scene.start_operator(control_plane.kubeconfig_for(scene.system, "hotweights-operator"))
    await serving(scene)
    await asyncio.to_thread(lambda: scene.kubectl("delete", "-f", "-", text=rights))
    await scene.has_rights(False)
    await scene.version("v0")  # something to write about, which is refused now
    await heard(scene, "forbidden")
    await ends(scene)


async def test_it_ends_while_nobody_answers(scene: Any, control_plane: ControlPlane) -> None:
    await scene.set_up(1)
    scene.start_operator()
    await serving(scene)
    await asyncio.to_thread(control_plane.stop_apiserver)
    try:
        await asyncio.sleep(1)
        await ends(scene)
    finally:
        await asyncio.to_thread(control_plane.start_apiserver)


async def test_it_goes_on_when_it_has_its_rights_again(
    scene: Any, control_plane: ControlPlane
) -> None:
    await scene.set_up(1)
    rights = await scene.grant()
    scene.start_operator(control_plane.kubeconfig_for(scene.system, "hotweights-operator"))
    await serving(scene)
    await asyncio.to_thread(lambda: scene.kubectl("delete", "-f", "-", text=rights))
    await scene.has_rights(False)
    await scene.version("v0")
    await heard(scene, "forbidden")
    await asyncio.to_thread(lambda: scene.kubectl("apply", "-f", "-", text=rights))
    await scene.engine_pod(0)
    scene.kubectl.apply(scene.rollout("v0"))
    await scene.reaches("TargetsFound")
    assert scene.process.poll() is None
