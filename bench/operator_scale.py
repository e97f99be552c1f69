"""What a rollout over many nodes costs on a real API server: the operator as its process, agents
and kubelets played by this one.

    python bench/operator_scale.py [--nodes 100 1000 5000] [--json FILE]

For each size there is a control plane of its own (etcd, the API server, controllers). A first
rollout brings all pods to v0; what is measured is the second one, `AllAtOnce` to v1: when all are
told to serve it (and how long from the first one told to the last), when all do, when the status
says so, how much of the operator's processor and memory that takes, how much is written, and how
large an object becomes. *Floor*: the last entries of the rollout once more, written to the same
nodes by a client that does nothing else, as many at a time as the operator does.

API server, etcd and all agents run on the same processors as the operator: by the clock it is their
sum. The operator's CPU seconds are its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.fleet import DIGESTS, MODELS, SYSTEM
from bench.live_fleet import LiveFleet
from bench.reconcile import processor, short
from hotweights_kube import (
    NODE_WEIGHTS,
    WEIGHT_ROLLOUTS,
    Api,
    Conflict,
    Selection,
)
from hotweights_kube.resources import CUSTOM_RESOURCE_DEFINITIONS
from hotweights_operator.runtime.perform import FENCE_ANNOTATION
from hotweights_operator.settings import Settings
from localcluster import binaries
from localcluster.controlplane import ControlPlane
from tests.ports import free_ports

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 1800.0
LOOK_SECONDS = 0.25
WITHOUT_KUBELETS = ("--controllers=-node-lifecycle-controller",)  # nobody beats for the nodes here
WRITES = Settings.writes
TICKS = os.sysconf("SC_CLK_TCK")
Figures = dict[str, float]


class Operator:
    """The operator's process, and what it says of itself."""

    def __init__(self, kubeconfig: Path, log: Path) -> None:
        self._port = free_ports()[0]
        self._log = log
        command = [
            sys.executable, "-m", "hotweights_operator", f"--namespace={SYSTEM}",
            f"--watch-namespace={MODELS}", "--metrics-port=0", f"--health-port={self._port}",
            "--log-level=warning",
        ]  # fmt: skip
        environment = {**os.environ, "KUBECONFIG": str(kubeconfig)}
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

    def cpu_seconds(self) -> float:
        """Of its life so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def mib(self, key: str) -> float:
        """VmRSS (now) or VmHWM (at most)."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
        return int(found[1]) / 1024 if found else float("nan")

    async def counted(self, metric: str) -> float:
        """The sum over all labels."""

        def ask() -> str:
            url = f"http://127.0.0.1:{self._port}/metrics"
            with urllib.request.urlopen(url, timeout=30) as answer:
                text: str = answer.read().decode()
                return text

        text = await asyncio.to_thread(ask)
        lines = re.findall(rf"^{re.escape(metric)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, lines))

    async def writes(self) -> float:
        """Requests that write; those for its lease are among them."""
        asked = [
            await self.counted(f'hotweights_operator_api_requests_total{{method="{method}",status="{status}"}}')
            for method in ("PATCH", "POST")
            for status in (200, 201, 409)
        ]  # fmt: skip
        return sum(asked)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        if said := self._log.read_text()[-2000:]:
            print(said, file=sys.stderr)


async def install(api: Api, plane: ControlPlane) -> None:
    """Our definitions, until they are served."""
    kubectl = str(binaries.ensure(["kubectl"])["kubectl"])
    files = [f"-f{path}" for path in sorted((ROOT / "crds").glob("*.yaml"))]
    words = [kubectl, f"--kubeconfig={plane.kubeconfig}"]
    await asyncio.to_thread(
        subprocess.run, [*words, "apply", *files], check=True, stdout=subprocess.DEVNULL
    )
    wait = ["wait", "--for=condition=Established", "crd", "--all", "--timeout=90s"]
    await asyncio.to_thread(subprocess.run, [*words, *wait], check=True, stdout=subprocess.DEVNULL)
    await api.list(CUSTOM_RESOURCE_DEFINITIONS)


async def complete(api: Api, version: str) -> float:
    """Wait until the rollout's status says so; when, by the event loop's clock."""
    loop = asyncio.get_running_loop()
    until, status = loop.time() + LIMIT_SECONDS, {}
    while loop.time() < until:
        body = await api.get(WEIGHT_ROLLOUTS, "llm", MODELS)
        status = body.get("status") or {}
        current = status.get("observedGeneration") == body["metadata"]["generation"]
        if current and status["phase"] == "Complete" and status["target"]["version"] == version:
            return loop.time()
        await asyncio.sleep(LOOK_SECONDS)
    raise SystemExit(f"{version} is not complete after {LIMIT_SECONDS:.0f} s: {status}")


async def rollout(api: Api, fleet: LiveFleet, operator: Operator) -> Figures:
    """To v1, from when it is written."""
    nodes, cpu = fleet.size, operator.cpu_seconds()
    wrote, fleets = await operator.writes(), fleet.written.copy()
    acted = await operator.counted("hotweights_operator_actions_total")
    began = await fleet.roll_out("v1")
    ended = await complete(api, "v1")
    made = fleet.written - fleets
    told, served = (sorted(fleet.moments[what, DIGESTS["v1"]]) for what in ("told", "served"))
    return {
        "told_seconds": told[-1] - began,
        "told_skew_seconds": told[-1] - told[0],
        "served_seconds": served[-1] - began,
        "served_skew_seconds": served[-1] - served[0],
        "complete_seconds": ended - began,
        "operator_cpu_seconds": operator.cpu_seconds() - cpu,
        "operator_applies_per_node": (
            await operator.counted("hotweights_operator_actions_total") - acted
        ) / nodes,
        "operator_writes_per_node": (await operator.writes() - wrote) / nodes,
        "agent_writes_per_node": made["agent"] / nodes,
        "gate_writes_per_node": made["gate"] / nodes,
        "kubelet_writes_per_node": made["kubelet"] / nodes,
        "operator_mib": operator.mib("VmRSS"),
        "operator_peak_mib": operator.mib("VmHWM"),
    }  # fmt: skip


async def largest(api: Api) -> Figures:
    """Of the objects that are ours, as JSON with everything in it."""
    sizes = {
        resource.kind: max(
            len(json.dumps(item)) for item in (await api.list(resource, Selection(space))).items
        )
        for resource, space in ((NODE_WEIGHTS, SYSTEM), (WEIGHT_ROLLOUTS, MODELS))
    }
    return {f"largest_{kind}_kib": size / 1024 for kind, size in sizes.items()}


async def floor(api: Api) -> Figures:
    """The rollout's entries once more, changed in nothing but an order's token."""
    gate = asyncio.Semaphore(WRITES)
    bodies = (await api.list(NODE_WEIGHTS, Selection(SYSTEM))).items
    ends: list[float] = []

    async def apply(body: dict[str, object]) -> None:
        metadata, spec = body["metadata"], body["spec"]
        (entry,) = spec["rollouts"]  # type: ignore[index]
        entry["pods"][0]["token"] += 1
        where = {key: metadata[key] for key in ("name", "namespace", "resourceVersion")}  # type: ignore[index]
        async with gate:
            with contextlib.suppress(Conflict):
                await api.apply(
                    NODE_WEIGHTS,
                    {"metadata": where, "spec": {"rollouts": [entry]}},
                    manager=f"hotweights-rollout-{entry['uid']}",
                )
            ends.append(time.perf_counter())

    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(apply(body) for body in bodies))
    return {
        "floor_seconds": ends[-1] - began,
        "floor_skew_seconds": ends[-1] - ends[0],
        "floor_cpu_seconds": time.process_time() - cpu,
    }


async def fence(api: Api, nodes: list[str]) -> Figures:
    """What an operator does that takes over from one that did not give up."""
    gate = asyncio.Semaphore(WRITES)

    async def mark(node: str) -> None:
        async with gate:
            patch = {"metadata": {"annotations": {FENCE_ANNOTATION: "bench"}}}
            await api.merge_patch(NODE_WEIGHTS, node, patch, namespace=SYSTEM)

    began = time.perf_counter()
    await asyncio.gather(*(mark(node) for node in nodes))
    return {"fence_seconds": time.perf_counter() - began}


@contextlib.asynccontextmanager
async def world(nodes: int) -> AsyncIterator[tuple[Api, LiveFleet, Operator, Figures]]:
    """A control plane, a fleet that serves v0, and the operator that brought it there."""
    with (
        ControlPlane(controller_manager_arguments=WITHOUT_KUBELETS) as plane,
        tempfile.TemporaryDirectory() as folder,
    ):
        async with await Api.connect(plane.kubeconfig, timeout_seconds=60) as api:
            await install(api, plane)
            fleet = LiveFleet(api, nodes)
            await fleet.set_up()
            operator = Operator(plane.kubeconfig, Path(folder) / "operator.log")
            follows = asyncio.create_task(fleet.follow())
            try:
                began = await fleet.roll_out("v0")
                first = await complete(api, "v0") - began
                yield api, fleet, operator, {"nodes": nodes, "first_complete_seconds": first}
            finally:
                follows.cancel()
                ends = await asyncio.gather(follows, return_exceptions=True)
                operator.end()
            for end in ends:
                if not isinstance(end, asyncio.CancelledError):
                    raise end or RuntimeError("the fleet ended by itself")


async def measure(nodes: int) -> Figures:
    """All figures of one size."""
    async with world(nodes) as (api, fleet, operator, figures):
        found = figures | await rollout(api, fleet, operator) | await largest(api)
        operator.process.kill()  # nobody else writes now
        return found | await floor(api) | await fence(api, list(fleet.agents))


ROWS = (
    ("AllAtOnce: applied → all are told to serve v1", "told_seconds", "s"),
    ("  → all serve it", "served_seconds", "s"),
    ("  → Complete", "complete_seconds", "s"),
    ("the first is told → the last is", "told_skew_seconds", "s"),
    ("  floor: first bare apply → last", "floor_skew_seconds", "s"),
    ("the first serves → the last does", "served_skew_seconds", "s"),
    ("floor: one bare apply for each node", "floor_seconds", "s"),
    ("marks of an operator that takes over", "fence_seconds", "s"),
    ("operator: CPU", "operator_cpu_seconds", "s"),
    ("  of the bare applies alone", "floor_cpu_seconds", "s"),
    ("operator: memory", "operator_mib", "MiB"),
    ("  at most", "operator_peak_mib", "MiB"),
    ("operator: applies per node", "operator_applies_per_node", ""),
    ("  all writes per node (events, statuses, the lease)", "operator_writes_per_node", ""),
    ("agents: NodeWeights per node", "agent_writes_per_node", ""),
    ("  pods' gates per node", "gate_writes_per_node", ""),
    ("kubelets: pods per node", "kubelet_writes_per_node", ""),
    ("largest NodeWeights", "largest_NodeWeights_kib", "KiB"),
    ("largest WeightRollout", "largest_WeightRollout_kib", "KiB"),
    ("(the rollout before, of pods that served nothing → Complete)", "first_complete_seconds", "s"),
)


def show(found: dict[int, Figures]) -> None:
    """A line for each figure, a column for each size."""
    columns = [f"{nodes:,} nodes" for nodes in found]
    table = Table(
        "", *columns, title=f"a rollout on a real API server, {os.cpu_count()} x {processor()}"
    )
    for name, key, unit in ROWS:
        table.add_row(name, *(f"{short(world[key])} {unit}".strip() for world in found.values()))
    Console(width=140).print(table)


def main() -> None:
    """Measure, print, and write what ``--json`` asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args()
    load, found = os.getloadavg()[0], {}
    for nodes in options.nodes:
        print(f"{nodes} nodes", file=sys.stderr)
        found[nodes] = asyncio.run(measure(nodes))
    show(found)
    print(f"load before: {load:.1f}; after: {os.getloadavg()[0]:.1f}")
    if options.json:
        worlds = {str(nodes): figures for nodes, figures in found.items()}
        options.json.write_text(
            json.dumps({"load_before": load, "worlds": worlds}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
