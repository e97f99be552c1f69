"""The cluster's own subtree of every cgroup hierarchy: the kernel's list of what we started.

Containers outlive containerd, and nobody here is told their process ids. But whatever a node starts
stays in the node's cgroups, so ending what is in there ends exactly ours, also after a killed run.
It works with version 1 (one tree for each controller) and version 2 (one tree).
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from localcluster.errors import ClusterError

MOUNT = Path("/sys/fs/cgroup")
_EMPTY_WITHIN_SECONDS = 20.0
_CPUSET_FILES = ("cpuset.cpus", "cpuset.mems")


def hierarchies(mount: Path = MOUNT) -> list[Path]:
    """The roots of the trees: one in version 2, one for each controller in version 1."""
    if (mount / "cgroup.controllers").exists():
        return [mount]
    # cpu,cpuacct may be one tree under three names.
    return sorted({path.resolve() for path in mount.iterdir() if (path / "cgroup.procs").exists()})


def name_of(cluster: str) -> str:
    """The cluster's cgroup, from the root."""
    return f"hotweights-{cluster}"


def create(relative: str) -> None:
    """Make a cgroup in every hierarchy."""
    for root in hierarchies():
        folder = root
        for part in relative.split("/"):
            folder = folder / part
            folder.mkdir(exist_ok=True)
            for file in _CPUSET_FILES:
                # In version 1 a new cpuset is empty and takes no process until it is filled.
                if (folder / file).exists() and not (folder / file).read_text().strip():
                    (folder / file).write_text((folder.parent / file).read_text())


def limit_cpus(relative: str, cpus: set[int]) -> None:
    """Let what runs in a cgroup and below it, now and later, use these cores only."""
    for root in hierarchies():
        # no cgroup may have less than one below it
        for folder, _, files in os.walk(root / relative, topdown=False):
            if "cpuset.cpus" in files:
                (Path(folder) / "cpuset.cpus").write_text(",".join(map(str, sorted(cpus))))


def weigh(relative: str, shares: int) -> None:
    """What a cgroup gets of a core that others want too, in version 1's unit: a process that is in
    no group has 1024.
    """
    # version 2's, as the kubelet and systemd convert
    weight = max(1, round(shares * 10000 / 262144))
    for root in hierarchies():
        for name, value in (("cpu.shares", shares), ("cpu.weight", weight)):
            if (root / relative / name).exists():
                (root / relative / name).write_text(str(value))


def share_of(cpus: set[int], index: int, nodes: int) -> set[int]:
    """The cores of one of so many nodes; all of them where there are fewer than nodes."""
    own = {cpu for place, cpu in enumerate(sorted(cpus)) if place % nodes == index}
    return own if len(cpus) >= nodes else cpus


def to_join(relative: str) -> Path:
    """The folder of a cgroup that a daemon joins so that it, and what it starts, can be found."""
    roots = hierarchies()
    tracked = [root for root in roots if root.name == "pids"] or roots[:1]
    return tracked[0] / relative


def processes(relative: str) -> set[int]:
    """Every process in the cgroup and below it."""
    found: set[int] = set()
    for root in hierarchies():
        for file in (root / relative).rglob("cgroup.procs"):
            try:
                found.update(int(line) for line in file.read_text().split())
            except (FileNotFoundError, OSError):
                continue  # removed while we looked
    return found - {0}


def oom_kills(relative: str) -> int:
    """How many processes the kernel has ended for want of memory in the cgroup and below it. In
    version 1 what was counted in a group goes with it: a container's does, its pod's stays. Raises
    `ClusterError` where nothing counts.
    """
    counts = []
    for root in hierarchies():
        # version 2 counts what is below as well
        files = [*(root / relative).rglob("memory.oom_control"), root / relative / "memory.events"]
        counts += [found for file in files if (found := _oom_kills(file)) is not None]
    if not counts:
        raise ClusterError(f"No cgroup of {relative} says whom the kernel ended for its memory.")
    return sum(counts)


def _oom_kills(file: Path) -> int | None:
    try:
        words = file.read_text().split()
    except OSError:
        return None  # there is none, or it was removed while we looked
    return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else None


def kill(relative: str) -> None:
    """SIGKILL to everything in the cgroup, again until it is empty, since a process may just be
    forking.
    """
    deadline = time.monotonic() + _EMPTY_WITHIN_SECONDS
    while pids := processes(relative):
        for pid in pids:
            _kill_member(pid, relative)
        if time.monotonic() > deadline:
            raise ClusterError(
                f"Processes {sorted(pids)} in cgroup {relative} do not die of SIGKILL; see dmesg."
            )
        time.sleep(0.05)


def remove(relative: str) -> None:
    """Delete the cgroup and everything below it. Nothing may run in it any more."""
    for root in hierarchies():
        for folder, _, _ in os.walk(root / relative, topdown=False):
            _remove_empty(Path(folder))


def _kill_member(pid: int, relative: str) -> None:
    """Kill a process if it is (still) a member: the handle first, then the check, so that it cannot
    be another's.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if pid in processes(relative):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)


def _remove_empty(folder: Path) -> None:
    deadline = time.monotonic() + _EMPTY_WITHIN_SECONDS
    while True:
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            # A cgroup stays busy for a moment after its last process.
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{folder} cannot be removed: {error}. What is in its cgroup.procs?"
                ) from error
            time.sleep(0.05)
        else:
            return
