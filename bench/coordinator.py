"""How fast a coordinator answers a thousand workers: calls and their latencies, and how soon a
commit has reached everybody.

The coordinator is a process of its own (one core: it is one thread); the workers are asynchronous
clients in a few other processes. They register, then send heartbeats at a fixed rate together while
an update of a big plan is submitted, begun, prepared by all and committed. A worker counts as
reached when a heartbeat's answer says committed; when the event arrived, which makes real workers
send theirs at once, is measured once in each process. Latencies are what a client sees, so they
include its own queue: on a machine with fewer cores than processes read ``within_50_ms_of_arrival``
too, which the coordinator counts.

    python bench/coordinator.py [--workers 1000] [--rate 2000] [--seconds 10] [--items 100000]
    [--backend memory] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from hotweights_coordinator.client.client import AsyncClient, Client
from hotweights_planner.header import TensorEntry
from hotweights_planner.manifest import build as build_manifest
from hotweights_planner.plan import Plan, build

CALL_SECONDS = 30.0
LIMIT_SECONDS = 120.0
CHUNKS_PER_TENSOR = 4
CHUNK_NBYTES = 4096


def make_plan(items: int) -> Plan:
    """That many chunks of invented digests."""
    tensors = items // CHUNKS_PER_TENSOR
    nbytes = CHUNKS_PER_TENSOR * CHUNK_NBYTES
    entries = [
        TensorEntry(f"model.layers.{n}.weight", "U8", (nbytes,), nbytes, 8 + nbytes * n)
        for n in range(tensors)
    ]
    chunks = {
        entry.name: [
            hashlib.sha256(f"{entry.name}/{k}".encode()).hexdigest()
            for k in range(CHUNKS_PER_TENSOR)
        ]
        for entry in entries
    }
    manifest = build_manifest(
        "bench", "v1", {"model.safetensors": entries}, chunks, chunk_nbytes=CHUNK_NBYTES
    )
    return build(manifest, None, "file:///weights/v1")


@contextmanager
def coordinator(backend: str, redis_url: str) -> Iterator[tuple[str, str, int, int]]:
    """Its endpoint, where its events are, the port of its metrics, and its process id."""
    command = [
        sys.executable,
        "-m",
        "hotweights.cli",
        "coord-serve",
        "--endpoint",
        "tcp://127.0.0.1:0",
        "--json",
    ]
    command += ["--backend", backend, "--metrics-port", "0", "--worker-ttl", "60"]
    command += ["--redis-url", redis_url] if redis_url else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        yield said["endpoint"], said["pub_endpoint"], said["metrics_port"], process.pid
    finally:
        process.terminate()
        process.wait(timeout=30)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = re.sub(r".*\) ", "", Path(f"/proc/{pid}/stat").read_text()).split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def within(port: int, seconds: float) -> float:
    """The share of all calls that the coordinator itself answered in that time; plans, which take
    longer, aside.
    """
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=CALL_SECONDS) as page:
        lines = page.read().decode().splitlines()
    counts: dict[str, float] = {}
    for line in lines:
        found = re.fullmatch(
            r'hotweights_coord_call_seconds_bucket\{le="([^"]+)",method="(\w+)"\} '
            r"(\S+)",
            line,
        )
        if found and found[2] != "submit_plan":
            counts[found[1]] = counts.get(found[1], 0.0) + float(found[3])
    return counts[str(seconds)] / counts["+Inf"]


class Worker:
    """One client that follows."""

    def __init__(self, name: str, endpoint: str, context: Any) -> None:
        self.name = name
        self.client = AsyncClient(endpoint, "", timeout_seconds=CALL_SECONDS, context=context)
        self.latencies: list[tuple[str, float, float]] = []  # method, seconds, when
        self.committed_at: float | None = None
        self.prepared = 0

    async def call(self, method: str, **args: Any) -> dict[str, Any]:
        began = time.perf_counter()
        result = (await self.client.call(method, worker_id=self.name, **args)).result
        self.latencies.append((method, time.perf_counter() - began, time.time()))
        return result

    async def register(self, after_seconds: float) -> None:
        await asyncio.sleep(after_seconds)
        await self.call("register", host="bench", endpoints=["tcp://127.0.0.1:1"])

    async def beat(self) -> None:
        assigned = await self.call("heartbeat", have=[])
        if assigned["state"] == "begun" and self.prepared != assigned["token"]:
            self.prepared = assigned["token"]
            await self.call("precommit", token=assigned["token"])
        if assigned["state"] == "committed" and self.committed_at is None:
            self.committed_at = time.time()


async def follow(
    pipe: Connection, first: int, count: int, endpoint: str, events: str, interval: float
) -> None:
    """Workers of one process: heartbeats at fixed times until told to stop."""
    context = zmq.Context()
    context.max_sockets = 10_000
    listening = zmq.asyncio.Context()
    workers = [Worker(f"w{first + n}", endpoint, context) for n in range(count)]
    listener = listening.socket(zmq.SUB)
    listener.linger = 0
    listener.subscribe(b"commit")
    listener.connect(events)
    await asyncio.gather(
        *(worker.register(interval * n / count) for n, worker in enumerate(workers))
    )
    pipe.send("registered")
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, pipe.recv)
    start = loop.time()
    stopped = loop.run_in_executor(None, pipe.recv)

    async def live(worker: Worker, phase: float) -> None:
        turn = 0
        while not stopped.done():
            await asyncio.sleep(max(0.0, start + phase + turn * interval - loop.time()))
            await worker.beat()
            turn += 1

    async def hear() -> float:
        await listener.recv_multipart()
        return time.time()

    hearing = asyncio.create_task(hear())
    await asyncio.gather(*(live(worker, interval * n / count) for n, worker in enumerate(workers)))
    latencies = [latency for worker in workers for latency in worker.latencies]
    async with asyncio.timeout(CALL_SECONDS):
        heard_at = await hearing
    pipe.send((latencies, [worker.committed_at for worker in workers], heard_at))
    for worker in workers:
        await worker.client.close()
    listener.close()
    context.term()
    listening.term()


def process(*args: Any) -> None:
    """Entry of a process of workers."""
    asyncio.run(follow(*args))


def percentile(values: list[float], share: float) -> float:
    """The value that this share of all is below."""
    return (
        sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")
    )


def measure(options: argparse.Namespace, plan: bytes) -> dict[str, Any]:
    """One run."""
    context = multiprocessing.get_context("spawn")
    interval = options.workers / options.rate
    with (
        coordinator(options.backend, options.redis_url) as (endpoint, events, metrics_port, pid),
        Client(endpoint, "") as operator,
    ):
        pipes, children = [], []
        share = options.workers // options.processes
        for number in range(options.processes):
            ours, theirs = context.Pipe()
            args = (theirs, number * share, share, endpoint, events, interval)
            child = context.Process(target=process, args=args, daemon=True)
            child.start()
            theirs.close()  # a child that dies is an end of file
            pipes.append(ours)
            children.append(child)
        began = time.perf_counter()
        for pipe in pipes:
            pipe.recv()
        register_seconds = time.perf_counter() - began
        for pipe in pipes:
            pipe.send("go")
        cpu_before, began = cpu_seconds(pid), time.perf_counter()
        time.sleep(options.seconds / 2)
        submitted, submitted_at = time.perf_counter(), time.time()
        operator.call("submit_plan", binary=plan, timeout_seconds=CALL_SECONDS * 4)
        submit_seconds = time.perf_counter() - submitted
        begun, begun_at = time.perf_counter(), time.time()
        operator.call("begin", version="v1", timeout_seconds=CALL_SECONDS)
        while (
            state := operator.call("status", timeout_seconds=CALL_SECONDS).result["state"]
        ) == "begun":
            if time.perf_counter() - begun > LIMIT_SECONDS:
                raise SystemExit(f"not all workers have precommitted after {LIMIT_SECONDS:g} s")
            time.sleep(0.05)
        precommit_seconds = time.perf_counter() - begun
        if state != "precommitted":
            raise SystemExit(f"the update is {state}")
        committed_at = time.time()
        operator.call("commit", version="v1", timeout_seconds=CALL_SECONDS)
        commit_call_seconds = time.time() - committed_at
        time.sleep(options.seconds / 2)
        for pipe in pipes:
            pipe.send("stop")
        latencies: list[tuple[str, float, float]] = []
        reached: list[float | None] = []
        heard: list[float] = []
        for pipe in pipes:
            some, commits, heard_at = pipe.recv()
            latencies += some
            heard.append(heard_at)
            reached += commits
        wall, cpu = time.perf_counter() - began, cpu_seconds(pid) - cpu_before
        for child in children:
            child.join()
            if child.exitcode:
                raise SystemExit(f"a process of workers ended with {child.exitcode}")
        calls = [seconds for method, seconds, _ in latencies if method != "register"]
        spans = {
            "alone": (0.0, submitted_at),
            "beside_a_submit": (submitted_at, begun_at),
            "while_all_precommit": (begun_at, committed_at),
            "from_the_commit_on": (committed_at, math.inf),
        }
        within_spans = {
            f"{name}_p99_ms": 1000
            * percentile(
                [s for m, s, at in latencies if m != "register" and since <= at < until], 0.99
            )
            for name, (since, until) in spans.items()
        }
        if missing := sum(1 for at in reached if at is None):
            raise SystemExit(f"the commit has not reached {missing} of {len(reached)} workers")
        return {
            "workers": share * options.processes,
            "backend": options.backend,
            "plan_bytes": len(plan),
            "plan_items": options.items,
            "register_all_seconds": register_seconds,
            "register_p99_ms": 1000
            * percentile([s for m, s, _ in latencies if m == "register"], 0.99),
            "calls": len(calls),
            "calls_per_second": len(calls) / wall,
            "p50_ms": 1000 * percentile(calls, 0.5),
            "p99_ms": 1000 * percentile(calls, 0.99),
            "max_ms": 1000 * max(calls),
            **within_spans,
            "within_50_ms_of_arrival": within(metrics_port, 0.05),
            "submit_seconds": submit_seconds,
            "begin_to_precommitted_seconds": precommit_seconds,
            "commit_call_seconds": commit_call_seconds,
            "commit_event_seconds": max(heard) - committed_at,
            "commit_reaches_all_seconds": max(at for at in reached if at is not None)
            - committed_at,
            "reached": len(reached),
            "coordinator_cpu_share": cpu / wall,
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument(
        "--rate", type=float, default=2000.0, help="heartbeats per second, of all workers together"
    )
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--items", type=int, default=100_000, help="of the plan")
    parser.add_argument("--backend", default="memory", choices=["memory", "redis"])
    parser.add_argument("--redis-url", default="")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    plan = make_plan(options.items).canonical
    result = measure(options, plan)
    for name, value in result.items():
        print(f"{name:<32} {value:.3f}" if isinstance(value, float) else f"{name:<32} {value}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
