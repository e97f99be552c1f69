"""What the tour needs of a machine, looked at before anything is installed or started.

Each thing that is missing is one sentence with its remedy. `lacks` decides and looks at nothing;
`observe` looks and decides nothing. Only the standard library is imported: on a fresh machine there
is nothing else yet.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from e2e.tour import install
from localvllm import build

GB = 10**9
NEEDED_MEMORY_NBYTES = 5 * GB
"""Two vLLMs for half a minute (the one that serves, and a cold one that is compared with), of which
each takes 2 GB, and the page cache of what they load.
"""
NEEDED_DISK_NBYTES = 9 * GB
"""vLLM's packages, unpacked once for the installer's cache and this environment, and the largest of
them packed. Both share their files where they lie on one file system.
"""
LONGEST_SOCKET_PATH = 107  # bytes: sun_path of unix(7), without the NUL at its end
SOCKET = Path("worker/agent.sock")  # in the tour's folder
HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Ports:
    """Where things listen; those that the documents name, unless they are moved."""

    coordinator: int = 5555
    events: int = 5556
    """The coordinator's: always the next one."""
    coordinator_metrics: int = 9100
    worker_metrics: int = 9099
    vllm: int = 8000

    @classmethod
    def starting_at(cls, first: int) -> Ports:
        """Five in a row."""
        return cls(*range(first, first + 5))

    def named(self) -> dict[int, str]:
        """Each, with who listens there."""
        return {
            self.coordinator: "the coordinator",
            self.events: "the coordinator's events",
            self.coordinator_metrics: "the coordinator's metrics",
            self.worker_metrics: "the worker's metrics",
            self.vllm: "vLLM",
        }


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found. Sizes are in bytes."""

    system: str
    """Operating system and architecture, as ``Linux x86_64``."""
    has_avx2: bool
    memory_nbytes: int
    """That can be had now without swapping."""
    cache: Path
    cache_nbytes: int
    """Free where vLLM is to be installed."""
    is_installed: bool
    """vLLM is there, or an environment with one was named."""
    taken: tuple[int, ...]
    """Ports of ours at which somebody else listens."""
    folder: Path
    """The tour's own, absolute."""


def lacks(machine: Machine, ports: Ports) -> list[str]:
    """What stands in the way of the tour; empty where nothing does."""
    found = []
    if machine.system != "Linux x86_64":
        found.append(
            f"this is {machine.system}, and the tour's vLLM for CPUs is built for Linux x86_64: "
            "take such a machine, or your own vLLM as docs/vllm.md shows"
        )
    elif not machine.has_avx2:
        found.append(
            "this processor has no AVX2, without which vLLM for CPUs does not run: take another "
            "machine"
        )
    if machine.memory_nbytes < NEEDED_MEMORY_NBYTES:
        found.append(
            f"{_gb(machine.memory_nbytes)} of memory are available, and the tour needs "
            f"{_gb(NEEDED_MEMORY_NBYTES)}: end what takes the rest, or take a larger machine"
        )
    if not machine.is_installed and machine.cache_nbytes < NEEDED_DISK_NBYTES:
        found.append(
            f"{_gb(machine.cache_nbytes)} are free for {machine.cache}, and vLLM needs "
            f"{_gb(NEEDED_DISK_NBYTES)} there: make room, or name another folder with "
            "HOTWEIGHTS_CACHE"
        )
    found += [
        f"port {port}, which is for {ports.named()[port]}, is in use: end what listens there, or "
        "move all five: make tour ARGS='--first-port 18000'"
        for port in machine.taken
    ]
    length = len(os.fsencode(machine.folder / SOCKET))
    if length > LONGEST_SOCKET_PATH:
        found.append(
            f"{machine.folder / SOCKET} has {length} bytes, and a socket's path may have "
            f"{LONGEST_SOCKET_PATH}: name a shorter folder: make tour ARGS='--folder /tmp/tour'"
        )
    return found


def observe(ports: Ports, folder: Path) -> Machine:
    """Look at this machine. Raises `BuildError` where HOTWEIGHTS_VLLM names no known release."""
    cache = build.cache()
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        has_avx2="avx2" in _read("/proc/cpuinfo"),
        memory_nbytes=_available_nbytes(),
        cache=cache,
        cache_nbytes=shutil.disk_usage(_existing(cache)).free,
        is_installed=install.has_vllm(),
        taken=tuple(port for port in ports.named() if _is_taken(port)),
        folder=folder.absolute(),
    )


def _available_nbytes() -> int:
    lines = (line.split() for line in _read("/proc/meminfo").splitlines())
    available = {words[0]: int(words[1]) * 1024 for words in lines if len(words) == 3}
    found = [available.get("MemAvailable:", NEEDED_MEMORY_NBYTES)]  # elsewhere it is not known
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if limit.isdecimal() and used.isdecimal():  # a container; not "max"
        found.append(int(limit) - int(used))
    return min(found)


def _is_taken(port: int) -> bool:
    with closing(socket.socket()) as probe:
        # as servers do: what was closed a moment ago is free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _gb(nbytes: int) -> str:
    return f"{nbytes / GB:.1f} GB"
