"""What the operator's loop costs as the fleet grows: a decision, an event, a pause, a whole
rollout.

    python bench/reconcile.py [--nodes 1000] [--scale] [--json FILE]

The operator's own parts run as in its process, between the API server and the fleet of
`bench.apiserver` and `bench.fleet`, which answer after 4 ms (the server) and 0.1-0.4 s (agents);
their CPU time is counted apart. Without kopf, HTTP and JSON: those cost the same whatever is
decided. Events and decisions are CPU time, all else is seconds by the clock. The *floor* of a
rollout is the same applies once more to a fresh fleet, as many at a time, with nothing decided.
``--scale`` measures events and decisions for 100 and 5,000 nodes too. Each world has a process of
its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.apiserver import Server
from bench.fleet import DIGESTS, ROLLOUT_UID, Fleet, kind_of
from bench.operator_loop import SETTINGS, Operator
from hotweights_kube.resources import NODE_WEIGHTS, Body

LIMIT_SECONDS = 300.0
QUIET_SECONDS = 1.0
TICK_SECONDS = 0.005
LOOK_SECONDS = 0.02
ROUNDS = 200
ROUNDS_SECONDS = 20.0
TOLD_BEFORE_PAUSE = 32
Figures = dict[str, float]


class Use:
    """What happened since it was made: CPU time, requests, and for how long the event loop stood
    still at most.
    """

    def __init__(self, server: Server) -> None:
        self._server, self._loop = server, asyncio.get_running_loop()
        self._cpu, self._fake, self._requests = (
            time.process_time(),
            server.cpu_seconds,
            server.requests.copy(),
        )
        self._longest, self._due = 0.0, 0.0
        self._tick()

    def _tick(self) -> None:
        now = self._loop.time()
        self._longest = max(self._longest, now - (self._due or now))
        self._due = now + TICK_SECONDS
        self._timer = self._loop.call_at(self._due, self._tick)

    def end(self, nodes: int) -> Figures:
        """The figures; it looks no more."""
        self._timer.cancel()
        fake = self._server.cpu_seconds - self._fake
        made = self._server.requests - self._requests
        return {
            "cpu_seconds": time.process_time() - self._cpu - fake,
            "fleet_cpu_seconds": fake,
            "longest_stall_ms": 1e3 * self._longest,
            "applies_per_node": made["apply"] / nodes,
            "conflicts": made["conflict"],
        }


@contextlib.asynccontextmanager
async def world(nodes: int, pods: int) -> AsyncIterator[tuple[Server, Fleet, Operator, Figures]]:
    """A fleet, and an operator that has listed it and come to rest; v1 is resolved, v0 is
    served.
    """
    server = Server()
    fleet = Fleet(server, nodes, pods)
    gc.collect()
    before = resident_mib()
    operator = Operator(server)
    fleet.begin(operator.note)
    for body in [body for bodies in server.objects.values() for body in bodies.values()]:
        operator.note(kind_of(body), body)
    gc.collect()
    figures = {"operator_mib": resident_mib() - before}
    began = time.monotonic()
    operator.start()
    await reaches(server, "WeightVersion", "v1", "Ready")
    await reaches(server, "WeightRollout", "llm", "Ready")
    quiet = await at_rest(server, operator)
    yield server, fleet, operator, {**figures, "start_seconds": quiet - began}
    await operator.stop()


async def at_rest(server: Server, operator: Operator) -> float:
    """Wait until nothing is asked any more, however often one looks; since when that is so."""
    asked, since, looks = -1, time.monotonic(), 0
    until = since + LIMIT_SECONDS
    while looks * LOOK_SECONDS < QUIET_SECONDS:
        if time.monotonic() > until:
            raise SystemExit(
                f"the operator still writes after {LIMIT_SECONDS:.0f} s: {dict(server.requests)}"
            )
        await asyncio.sleep(LOOK_SECONDS)
        looks += 1
        now = server.requests.total() + operator.depth
        if now != asked:
            asked, since, looks = now, time.monotonic(), 0
    return since


async def reaches(server: Server, kind: str, name: str, condition: str) -> float:
    """Wait until the status says so of the spec as it stands; the event loop's time then."""
    loop = asyncio.get_running_loop()
    until = loop.time() + LIMIT_SECONDS
    status: Body = {}
    while loop.time() < until:
        body = server.objects[kind][name]
        status, generation = body["status"], body["metadata"]["generation"]
        found = (
            c
            for c in status.get("conditions", ())
            if c["type"] == condition and c["status"] == "True"
        )
        if status.get("observedGeneration") == generation and any(found):
            return loop.time()
        await asyncio.sleep(LOOK_SECONDS)
    raise SystemExit(f"{kind} {name} is not {condition} after {LIMIT_SECONDS:.0f} s: {status}")


async def small_steps(nodes: int, pods: int) -> Figures:
    """One node's agent says something; the operator hears of it, and decides. Nothing else
    happens.
    """
    events: list[float] = []
    decisions: list[float] = []
    async with world(nodes, pods) as (_, fleet, operator, figures):
        await operator.stop()
        names = list(fleet.agents)
        until = time.monotonic() + ROUNDS_SECONDS
        while len(events) < ROUNDS and (time.monotonic() < until or len(events) < 5):
            body = fleet.touched(names[len(events) * 7 % len(names)])
            began = time.thread_time()
            operator.note("state", body)
            noted = time.thread_time()
            operator.decide()
            decisions.append(1e3 * (time.thread_time() - noted))
            events.append(1e3 * (noted - began))
    spread = {
        f"{name}_{k}": v
        for name, values in (("event", events), ("decide", decisions))
        for k, v in two(values)
    }
    return {"nodes": nodes, "pods": nodes * pods, "rounds": len(events), **spread, **figures}


async def all_at_once(nodes: int, pods: int) -> Figures:
    """A whole rollout from v0 to v1, and its floor."""
    async with world(nodes, pods) as (server, fleet, _, figures):
        use, began = Use(server), asyncio.get_running_loop().time()
        fleet.edit(versionRef={"name": "v1"})
        complete = await reaches(server, "WeightRollout", "llm", "Ready")
        used = use.end(nodes)
        prepared, told, served = (
            fleet.moments[what, DIGESTS["v1"]] for what in ("prepared", "told", "served")
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "spec_to_prepared_seconds": prepared - began,
        "spec_to_told_seconds": told - began,
        "spec_to_complete_seconds": complete - began,
        "prepared_to_told_seconds": told - prepared,
        "prepared_to_served_seconds": served - prepared,
        "prepared_to_complete_seconds": complete - prepared,
        **used,
        "peak_mib": peak,
        **await floor(server, nodes, pods),
        **{f"rollout_{name}": value for name, value in figures.items()},
    }


async def floor(asked: Server, nodes: int, pods: int) -> Figures:
    """The rollout's last applies once more, to a fleet that never heard of them, with nothing
    decided and nobody listening.
    """
    server, gate = Server(), asyncio.Semaphore(SETTINGS.writes)
    Fleet(server, nodes, pods)
    versions = {
        name: body["metadata"]["resourceVersion"]
        for name, body in server.objects["NodeWeights"].items()
    }

    async def apply(name: str, manager: str, body: Body) -> None:
        metadata = {**body["metadata"], "resourceVersion": versions[name]}
        async with gate:
            await server.apply(NODE_WEIGHTS, {**body, "metadata": metadata}, manager=manager)

    use, began = Use(server), time.perf_counter()
    wanted = {key: body for key, body in asked.applied.items() if key[1].endswith(ROLLOUT_UID)}
    await asyncio.gather(*(apply(name, manager, body) for (name, manager), body in wanted.items()))
    return {
        "floor_seconds": time.perf_counter() - began,
        "floor_cpu_seconds": use.end(nodes)["cpu_seconds"],
    }


async def pause(nodes: int, pods: int) -> Figures:
    """The rollout is paused when some pods were told to change: how many more are, and when the
    status says Paused.
    """
    paused_at = heard_at = 0.0
    told_at = {"pause": 0, "heard": 0}
    v1 = DIGESTS["v1"]
    async with world(nodes, pods) as (server, fleet, operator, _):
        loop = asyncio.get_running_loop()

        def noted(what: str, digest: str) -> None:
            nonlocal paused_at
            if (
                not paused_at
                and what == "told"
                and digest == v1
                and fleet.counts[what, digest] >= TOLD_BEFORE_PAUSE
            ):
                paused_at, told_at["pause"] = loop.time(), fleet.counts[what, digest]
                fleet.edit(paused=True)

        def tell(kind: str, body: Body) -> None:
            nonlocal heard_at
            if kind == "rollout" and body["spec"].get("paused") and not heard_at:
                heard_at, told_at["heard"] = loop.time(), fleet.counts["told", v1]
            operator.note(kind, body)

        fleet.noted = noted
        fleet.begin(tell)
        fleet.edit(versionRef={"name": "v1"})
        said_at = await reaches(server, "WeightRollout", "llm", "Paused")
        await at_rest(server, operator)
        told = fleet.counts["told", v1]
    return {
        "pause_seconds": said_at - paused_at,
        "pause_heard_seconds": heard_at - paused_at,
        "told_before_pause": told_at["pause"],
        "told_after_pause": told - told_at["pause"],
        "told_after_heard": told - told_at["heard"],
        "told_in_flight_allowed": SETTINGS.writes,
    }


def two(values: Sequence[float]) -> list[tuple[str, float]]:
    """The middle and the 99th percentile."""
    ordered = sorted(values)
    return [
        ("median_ms", statistics.median(ordered)),
        ("p99_ms", ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]),
    ]


def resident_mib() -> float:
    """Memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(row: Callable[[int, int], Coroutine[Any, Any, Figures]], nodes: int, pods: int) -> Figures:
    """A row in this process."""
    return asyncio.run(row(nodes, pods))


def measure(nodes: int, *, scale: bool) -> dict[str, Figures]:
    """All figures by world; the rollout's and the pause's stand with the first."""
    one = f"{nodes} x 1"
    small = {one: (nodes, 1), "200 x 100": (200, 100)} | (
        {"100 x 1": (100, 1), "5000 x 1": (5000, 1)} if scale else {}
    )
    found = {name: apart(small_steps, *size) for name, size in small.items()}
    found[one] |= apart(all_at_once, nodes, 1) | apart(pause, nodes, 1)
    return found


def apart(
    row: Callable[[int, int], Coroutine[Any, Any, Figures]], nodes: int, pods: int
) -> Figures:
    """A row in a process of its own, so that memory and collections of garbage are its own."""
    print(f"{row.__name__} of {nodes} x {pods}", file=sys.stderr)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, row, nodes, pods).result()


ROWS = (
    ("a node's agent speaks: the event, median", "event_median_ms", "ms"),
    ("  p99", "event_p99_ms", "ms"),
    ("and a decision about the rollout, median", "decide_median_ms", "ms"),
    ("  p99", "decide_p99_ms", "ms"),
    ("from the list to rest", "start_seconds", "s"),
    ("memory for it all", "operator_mib", "MiB"),
    ("AllAtOnce: the spec changes → all have prepared", "spec_to_prepared_seconds", "s"),
    ("  → all are told", "spec_to_told_seconds", "s"),
    ("  → Complete", "spec_to_complete_seconds", "s"),
    ("the last has prepared → all are told", "prepared_to_told_seconds", "s"),
    ("  → all serve", "prepared_to_served_seconds", "s"),
    ("  → Complete", "prepared_to_complete_seconds", "s"),
    ("floor: as many applies, nothing decided", "floor_seconds", "s"),
    ("CPU of the whole rollout", "cpu_seconds", "s"),
    ("  of the applies alone", "floor_cpu_seconds", "s"),
    ("  (the fleet's, not counted above)", "fleet_cpu_seconds", "s"),
    ("longest stall of the event loop", "longest_stall_ms", "ms"),
    ("applies per node", "applies_per_node", ""),
    ("conflicts", "conflicts", ""),
    ("memory of the process at most", "peak_mib", "MiB"),
    ("pause: written → the status says Paused", "pause_seconds", "s"),
    ("  told before", "told_before_pause", "pods"),
    ("  told after it was written", "told_after_pause", "pods"),
    ("  told after the operator heard of it", "told_after_heard", "pods"),
    ("  writes under way that are allowed", "told_in_flight_allowed", "pods"),
)


def show(found: dict[str, Figures]) -> None:
    """A line for each figure, a column for each world."""
    table = Table(
        "", *found, title=f"the operator's loop, nodes x pods, on {os.cpu_count()} x {processor()}"
    )
    for name, key, unit in ROWS:
        cells = [
            f"{short(world[key])} {unit}".strip() if key in world else ""
            for world in found.values()
        ]
        table.add_row(name, *cells)
    Console(width=140).print(table)


def short(value: float) -> str:
    """Three digits, or a whole number."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def processor() -> str:
    """What this was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def main() -> None:
    """Measure, print, and write what ``--json`` asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=1000, help="with one pod each")
    parser.add_argument(
        "--scale", action="store_true", help="decisions and events of 100 and 5000 nodes too"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    found = measure(options.nodes, scale=options.scale)
    show(found)
    print(f"load before: {load:.1f}; after: {os.getloadavg()[0]:.1f}")
    if options.json:
        options.json.write_text(json.dumps({"load_before": load, "worlds": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
