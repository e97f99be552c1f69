"""``python -m bench.dashboard``: what panels of the dashboard show of rollouts, as a picture for the
documents.

A control plane, the operator and a Prometheus are real; the nodes and pods are those of
``tests/operator``. It tells a story: a version, another, one that every pod refuses, and the way
back. The panels' own queries are asked, and what Prometheus answers is drawn; Grafana is not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.curves import Curve, Panel, draw
from e2e.harness.prometheus import Prometheus, prometheus
from hotweights_kube import Api
from localcluster.controlplane import ControlPlane
from tests.operator.conftest import ROOT, WITHOUT_KUBELETS, Kubectl, Scene, install

DASHBOARD = ROOT / "dashboards" / "hotweights.json"
PICTURE = ROOT / "docs" / "pictures" / "dashboard.svg"
SHOWN = (
    "Rollouts by phase",
    "Pods of a rollout",
    "WeightVersions by what became of them",
    "Decisions per second",
    "Answers of the API server per second",
)
MOST_CURVES = 5  # more are not told apart
HELD_SECONDS = 12.0  # so long each state is left as it is, to be seen
SCRAPED_EVERY_SECONDS = 1


def main() -> None:
    """Play the story, and write the picture."""
    parser = argparse.ArgumentParser(prog="python -m bench.dashboard", description=__doc__)
    parser.add_argument("--out", type=Path, default=PICTURE, help="(default: %(default)s)")
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="hotweights-dashboard-") as folder:
        arguments.out.write_text(asyncio.run(_told(Path(folder))))


async def _told(folder: Path) -> str:
    async with _scene(folder) as scene:
        await scene.set_up(2)
        scene.start_operator()
        target = f"127.0.0.1:{scene.health_port}"
        with prometheus(folder, [target]) as server:
            await asyncio.to_thread(server.until_scraped, 1)
            start = time.time()
            await _story(scene)
            end = time.time()
            return await asyncio.to_thread(_drawn, server, start, end)


@asynccontextmanager
async def _scene(folder: Path) -> AsyncIterator[Scene]:
    with ControlPlane(controller_manager_arguments=WITHOUT_KUBELETS) as plane:
        kubectl = Kubectl(plane.kubeconfig)
        await asyncio.to_thread(install, kubectl)
        async with await Api.connect(plane.kubeconfig, timeout_seconds=30) as api:
            scene = Scene(api, kubectl, plane.kubeconfig, folder)
            try:
                yield scene
            finally:
                await scene.close()


async def _story(scene: Scene) -> None:
    for index in range(4):
        await scene.engine_pod(index, index % 2)
    for name in ("v0", "v1", "bad"):
        await scene.version(name)
    for node in scene.nodes.values():
        node.refuses.add(scene.contents["file:///models/bad"])
    for name, end in (("v0", "Ready"), ("v1", "Ready"), ("bad", "Stalled"), ("v1", "Ready")):
        scene.kubectl.apply(scene.rollout(name))
        await scene.reaches(end)
        await asyncio.sleep(HELD_SECONDS)


def _drawn(server: Prometheus, start: float, end: float) -> str:
    seconds = int(end - start)
    found = {panel["title"]: panel for panel in json.loads(DASHBOARD.read_text())["panels"]}
    panels = [_panel(server, found[title], start, seconds) for title in SHOWN]
    return draw(panels, seconds, "seconds; v0, v1, a version that every pod refuses, v1 again")


def _panel(server: Prometheus, panel: dict[str, Any], start: float, seconds: int) -> Panel:
    (asked,) = panel["targets"]
    curves = []
    for series in server.range(asked["expr"], start, start + seconds, SCRAPED_EVERY_SECONDS):
        values = [0.0] * seconds  # before it was there, it was none
        for moment, value in series["values"]:
            at = int(float(moment) - start)
            if 0 <= at < seconds:
                values[at] = float(value)
        name = " ".join(v for k, v in series["metric"].items() if k not in ("namespace", "name"))
        if any(values):  # what never was is not drawn
            curves.append(Curve(name, values))
    curves.sort(key=lambda curve: sum(curve.values), reverse=True)
    return Panel(panel["title"], curves[:MOST_CURVES])


if __name__ == "__main__":
    main()
