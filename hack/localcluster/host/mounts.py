"""What makes one machine's file system look like a different one to each node.

Two nodes on one machine would share every hostPath: the second agent would bind the first one's
socket. So each node has a mount namespace in which /run is new and the folders where Kubernetes and
Hotweights keep a node's state are its own; everything else (programs, models, this repository) is
the machine's. Containers' and volumes' mounts happen in there too, so they go with the namespace
and never reach the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from localcluster.host.commands import run
from localcluster.host.slots import RUN

PRIVATE_FOLDERS = (
    "/var/lib/kubelet",
    "/var/lib/containerd",
    "/var/lib/cni",
    "/var/lib/hotweights",
    "/var/log/pods",
    "/var/log/containers",
)
"""Beside /run: what each node has for itself. On the host they are made if they are missing, and
stay empty.
"""


def namespace_file(cluster: str, node: str) -> Path:
    """Where the node's mount namespace is kept alive."""
    return RUN / "mounts" / cluster / f"{node}.mnt"


def create(cluster: str, node: str, state: Path, private: Sequence[str] = PRIVATE_FOLDERS) -> None:
    """Make the namespace; `state` takes the node's own version of the private folders."""
    file = namespace_file(cluster, node)
    _make_holder(file.parent)
    file.touch()
    # `slave`, then shared again: the host's later mounts arrive in here, ours reach all of the
    # node's
    # processes (which volumes with mount propagation need), and none of them reaches the host.
    run(["unshare", f"--mount={file}", "--propagation", "slave", "mount", "--make-rshared", "/"])
    inside = ["nsenter", f"--mount={file}", "mount"]
    run([*inside, "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"])
    for folder in private:
        own = state / "fs" / folder.removeprefix("/")
        own.mkdir(parents=True, exist_ok=True)
        if not Path(folder).exists():
            Path(folder).mkdir(parents=True, exist_ok=True)
            with (RUN / "made").open("a") as made:
                made.write(f"{folder}\n")
        run([*inside, "--bind", own, folder])


def remove_node(cluster: str, node: str) -> None:
    """Let go of one node's mount namespace, and so of its /run. What is in the private folders
    stays.
    """
    file = namespace_file(cluster, node)
    if mounted_below(file, Path("/proc/self/mountinfo").read_text()):
        run(["umount", file])


def remove(cluster: str) -> None:
    """Let go of all the cluster's mount namespaces; the kernel ends them with their last
    process.
    """
    holder = RUN / "mounts" / cluster
    for point in reversed(mounted_below(holder, Path("/proc/self/mountinfo").read_text())):
        run(["umount", point])
    if holder.exists():
        for file in holder.iterdir():
            file.unlink()
        holder.rmdir()


def remove_made() -> None:
    """Delete the folders that we made on the host. Only when no node is left: deleting ends mounts
    on them too.
    """
    made = RUN / "made"
    if made.exists():
        for folder in set(made.read_text().split()):
            with suppress(FileNotFoundError):
                Path(folder).rmdir()
        made.unlink()


def mounted_below(folder: Path, mountinfo: str) -> list[Path]:
    """The mount points at or below a folder, in the order in which they were mounted."""
    points = (Path(line.split()[4].replace("\\040", " ")) for line in mountinfo.splitlines())
    return [point for point in points if point == folder or folder in point.parents]


def _make_holder(folder: Path) -> None:
    """A namespace can be kept only below a private mount: on a shared one it would be mounted into
    itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not mounted_below(folder, Path("/proc/self/mountinfo").read_text()):
        run(["mount", "--bind", folder, folder])
        run(["mount", "--make-private", folder])
