"""Node to node on loopback: how fast a verified version moves, beside what plain sockets do in the
same run.

    python bench/peer.py [--transport tcp|ucx] [--gigabytes 1] [--streams 2] [--rounds 7] [--json
    FILE]
    python bench/peer.py --nodes 8 [--link-bytes-per-second 100000000] [--gigabytes 0.5]

Two processes. *Ours* is the whole way: authenticated streams, requests, chunks from sealed memory
(over TCP by sendfile), BLAKE3 of every chunk, and at the end the version in new memory that engines
can map. The *floor* is what plain sockets need for the same bytes in as much new shared memory:
with as many streams, one `sendall` loop and one `recv_into` loop for each; nothing is hashed,
framed or asked for. *The wire alone* is the same into memory that was there before: what is left
when new pages cost nothing, as they do on a node with cores to spare. On a machine with few cores
new pages, not sockets, are most of the work, and all three compete for the processor with each
other. They are measured by turns, so that all see the same machine; medians are compared.

With ``--nodes`` as many processes form a chain from one that has the version, and the time of the
last is held against S/B, B being the limit that every node's link is given (on loopback all nodes
share one machine's cores: without a limit this measures those, not the chain).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import mmap
import multiprocessing
import os
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from blake3 import blake3
from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table

from hotweights_agent.staging.chunk_sources import PeerSource
from hotweights_agent.staging.fetch import Fetch
from hotweights_agent.staging.store import Store
from hotweights_planner.header import TensorEntry
from hotweights_planner.manifest import CHUNK_NBYTES, Manifest, build
from hotweights_transports.peers.base import ClientLimits, Identity, ServerLimits
from hotweights_transports.peers.registry import transport_for

TRANSPORTS = ("tcp", "ucx")
TENSOR_CHUNKS = 16
SENT_AT_ONCE = CHUNK_NBYTES


def admit(_token: str) -> Identity:
    return Identity("bench")


def token() -> str:
    return "bench"


def chunk_content(number: int) -> bytes:
    """Different for each number, and cheap to make."""
    return struct.pack("<Q", number) + BLOCK[8:]


BLOCK = os.urandom(CHUNK_NBYTES) if __name__ == "__main__" else bytes(CHUNK_NBYTES)


def make_version(nbytes: int) -> tuple[Manifest, dict[str, bytes]]:
    """A manifest of about `nbytes`, and its chunks' contents by digest."""
    count = max(1, nbytes // (TENSOR_CHUNKS * CHUNK_NBYTES))
    entries: list[TensorEntry] = []
    chunks: dict[str, list[str]] = {}
    contents: dict[str, bytes] = {}
    size = TENSOR_CHUNKS * CHUNK_NBYTES
    for number in range(count):
        name = f"model.layers.{number}.weight"
        entries.append(TensorEntry(name, "U8", (size,), size, number * size))
        chunks[name] = []
        for index in range(TENSOR_CHUNKS):
            content = chunk_content(number * TENSOR_CHUNKS + index)
            digest = blake3(content).hexdigest()
            contents[digest] = content
            chunks[name].append(digest)
    return build("bench", "v1", {"model.safetensors": entries}, chunks), contents


def stage(store: Store, manifest: Manifest, contents: dict[str, bytes]) -> None:
    with store.begin(manifest) as staging:
        for digest in staging.builder.missing:
            staging.builder.put(digest, contents[digest])
        staging.commit()


def anywhere(transport: str) -> str:
    return f"{transport}://127.0.0.1:0"


def parent(pipe: Connection, nbytes: int, streams: int, here: str) -> None:
    """The process that has the version: serves it our way, and sends as many plain bytes whenever
    somebody connects.
    """
    store = Store()
    manifest, contents = make_version(nbytes)
    stage(store, manifest, contents)
    contents.clear()
    memory = mmap.mmap(-1, manifest.nbytes)
    for at in range(0, manifest.nbytes, len(BLOCK)):
        memory[at : at + len(BLOCK)] = BLOCK
    plain = socket.create_server(("127.0.0.1", 0), backlog=64)
    threading.Thread(target=send_plain, args=(plain, memory, streams), daemon=True).start()
    with transport_for(here).listen(here, store, admit) as server:
        pipe.send((server.address, plain.getsockname(), manifest.canonical))
        pipe.recv()


def send_plain(listener: socket.socket, memory: mmap.mmap, streams: int) -> None:
    share = len(memory) // streams

    def send(sock: socket.socket) -> None:
        with sock, memoryview(memory) as view:
            for at in range(0, share, SENT_AT_ONCE):
                sock.sendall(view[at : min(at + SENT_AT_ONCE, share)])

    while True:
        threading.Thread(target=send, args=(listener.accept()[0],), daemon=True).start()


def receive_plain(address: tuple[str, int], into: mmap.mmap, streams: int) -> None:
    share = len(into) // streams

    def receive(number: int) -> None:
        with socket.create_connection(address) as sock, memoryview(into) as view:
            at, end = number * share, (number + 1) * share
            while at < end:
                at += sock.recv_into(view[at:end])

    threads = [threading.Thread(target=receive, args=(number,)) for number in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def plain_once(address: tuple[str, int], nbytes: int, streams: int) -> float:
    """Seconds until so many bytes are in new memory."""
    began = time.perf_counter()
    fd = os.memfd_create("floor")
    os.ftruncate(fd, nbytes)
    with mmap.mmap(fd, nbytes) as memory:
        receive_plain(address, memory, streams)
        seconds = time.perf_counter() - began
    os.close(fd)
    return seconds


def wire_once(address: tuple[str, int], memory: mmap.mmap, streams: int) -> float:
    """Seconds until so many bytes are in memory that was there before."""
    began = time.perf_counter()
    receive_plain(address, memory, streams)
    return time.perf_counter() - began


def fetch_once(address: str, manifest: Manifest, streams: int) -> float:
    """Seconds until the version is in this process's memory, verified and sealed."""
    store = Store()
    with transport_for(address).connect(address, token, ClientLimits(streams=streams)) as client:
        began = time.perf_counter()
        with store.begin(manifest) as staging:
            Fetch(staging.builder, [PeerSource(client, manifest.digest)]).run()
            staging.commit()
        seconds = time.perf_counter() - began
    store.release(manifest.digest)
    return seconds


@dataclasses.dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second, one for each round."""

    ours: list[float]
    floor: list[float]
    wire: list[float]

    def result(self) -> dict[str, float]:
        ours, floor = statistics.median(self.ours), statistics.median(self.floor)
        return {
            "ours_bytes_per_second": ours,
            "floor_bytes_per_second": floor,
            "ratio": ours / floor,
        }


def measure_pair(nbytes: int, streams: int, rounds: int, transport: str, console: Console) -> Rates:
    here, there = multiprocessing.Pipe()
    arguments = (there, nbytes, streams, anywhere(transport))
    process = multiprocessing.get_context("fork").Process(
        target=parent, args=arguments, daemon=True
    )
    process.start()
    address, plain, canonical = here.recv()
    manifest = Manifest.model_validate_json(canonical)
    memory = mmap.mmap(-1, manifest.nbytes)
    rates = Rates([], [], [])
    wire_once(plain, memory, streams)  # from here on its pages are there
    with Bar(console=console, transient=True) as bar:
        for _ in bar.track(range(rounds), description="by turns"):
            rates.floor.append(manifest.nbytes / plain_once(plain, manifest.nbytes, streams))
            rates.ours.append(manifest.nbytes / fetch_once(address, manifest, streams))
            rates.wire.append(manifest.nbytes / wire_once(plain, memory, streams))
    here.send("end")
    process.join()
    return rates


def link(
    pipe: Connection, canonical: bytes, streams: int, bytes_per_second: int | None, here: str
) -> None:
    """One node of a chain: serves what it fetches while it fetches it."""
    store = Store()
    manifest = Manifest.model_validate_json(canonical)
    limits = ServerLimits(bandwidth_bytes_per_second=bytes_per_second)
    with transport_for(here).listen(here, store, admit, limits) as server:
        pipe.send(server.address)
        parent_address = pipe.recv()
        if parent_address is None:
            contents = make_version(manifest.nbytes)[1]
            stage(store, manifest, contents)
            pipe.send("has it")
        else:
            pipe.send("ready")
            pipe.recv()
            client = transport_for(parent_address).connect(
                parent_address, token, ClientLimits(streams=streams)
            )
            with store.begin(manifest) as staging:
                Fetch(staging.builder, [PeerSource(client, manifest.digest)]).run()
                staging.commit()
            # CLOCK_MONOTONIC: the same for all processes of a machine
            pipe.send(time.perf_counter())
        pipe.recv()


def measure_chain(
    nodes: int, nbytes: int, streams: int, bytes_per_second: int | None, transport: str
) -> tuple[int, list[float]]:
    """Bytes of the version, and when each node had it, in seconds from the start."""
    manifest = make_version(nbytes)[0]
    context = multiprocessing.get_context("fork")
    pipes: list[Connection] = []
    for _ in range(nodes + 1):
        here, there = context.Pipe()
        arguments = (there, manifest.canonical, streams, bytes_per_second, anywhere(transport))
        context.Process(target=link, args=arguments, daemon=True).start()
        pipes.append(here)
    addresses = [pipe.recv() for pipe in pipes]
    for pipe, parent_address in zip(pipes, [None, *addresses[:-1]], strict=True):
        pipe.send(parent_address)
    for pipe in pipes:
        pipe.recv()
    began = time.perf_counter()
    for pipe in pipes[1:]:
        pipe.send("go")
    done = [pipe.recv() - began for pipe in pipes[1:]]
    for pipe in pipes:
        pipe.send("end")
    return manifest.nbytes, done


def show_pair(rates: Rates, streams: int, nbytes: int, transport: str, console: Console) -> None:
    title = (
        f"{nbytes / 1e9:.2f} GB over {streams} streams of {transport}, two processes, "
        f"{len(rates.ours)} rounds"
    )
    table = Table(title=title)
    for column in ("", "median GB/s", "best GB/s"):
        table.add_column(column, justify="left" if not column else "right")
    rows = [
        ("floor: plain sockets into new memory", rates.floor),
        ("ours: verified, in new memory", rates.ours),
        ("the wire alone: into old memory", rates.wire),
    ]
    for name, measured in rows:
        table.add_row(
            name, f"{statistics.median(measured) / 1e9:.2f}", f"{max(measured) / 1e9:.2f}"
        )
    table.add_section()
    table.add_row(
        "ours / floor",
        f"{rates.result()['ratio']:.2f}",
        f"{max(rates.ours) / max(rates.floor):.2f}",
    )
    wire = statistics.median(rates.ours) / statistics.median(rates.wire)
    table.add_row(
        "ours / the wire alone", f"{wire:.2f}", f"{max(rates.ours) / max(rates.wire):.2f}"
    )
    console.print(table)


def show_chain(
    nbytes: int, done: list[float], bytes_per_second: int | None, console: Console
) -> None:
    table = Table(title=f"{nbytes / 1e9:.2f} GB along a chain of {len(done)} nodes")
    table.add_column("node", justify="right")
    table.add_column("has it after", justify="right")
    if bytes_per_second:
        table.add_column("of S/B", justify="right")
    for number, seconds in enumerate(done, start=1):
        share = [f"{seconds * bytes_per_second / nbytes:.3f}"] if bytes_per_second else []
        table.add_row(str(number), f"{seconds:.2f} s", *share)
    console.print(table)


def write_json(file: Path | None, found: dict[str, float]) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=2) + "\n")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    number: Callable[[str], int] = lambda text: int(float(text))  # noqa: E731
    parser.add_argument(
        "--transport", choices=TRANSPORTS, default="tcp", help="what carries the chunks"
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the version")
    parser.add_argument(
        "--streams", type=int, default=ClientLimits().streams, help="connections per pair of nodes"
    )
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each kind")
    parser.add_argument(
        "--nodes", type=int, default=0, help="measure a chain of so many nodes instead"
    )
    parser.add_argument(
        "--link-bytes-per-second", type=number, default=None, help="limit of each node's link"
    )
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="write the result there"
    )
    options = parser.parse_args(arguments)
    nbytes = int(options.gigabytes * 1e9)
    console = Console()
    if options.nodes:
        limit = options.link_bytes_per_second
        nbytes, done = measure_chain(
            options.nodes, nbytes, options.streams, limit, options.transport
        )
        show_chain(nbytes, done, limit, console)
        write_json(options.json, {"nbytes": nbytes, "seconds": max(done)})
        return 0
    rates = measure_pair(nbytes, options.streams, options.rounds, options.transport, console)
    show_pair(rates, options.streams, nbytes, options.transport, console)
    write_json(options.json, rates.result())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
