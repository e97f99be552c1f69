"""What must be there before anything starts, asked for by name.

The control plane alone needs Go (once, to build) and openssl. Nodes need root and a few Debian
packages; those are the only thing that this package ever installs into the system, and it says so
when it does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from localcluster.errors import ClusterError
from localcluster.host.commands import run
from localcluster.progress import say, step

_APT_TIMEOUT_SECONDS = 600.0
_SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")


@dataclass(frozen=True, slots=True)
class Need:
    """A program, the Debian package it is in, and what it is for."""

    program: str  # a name on PATH, or an absolute path
    package: str
    purpose: str

    def met(self) -> bool:
        """Whether it is installed."""
        # sbin is missing in many users' PATH, and the daemons look there themselves.
        search = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SYSTEM_FOLDERS])
        return (
            Path(self.program).exists()
            if self.program.startswith("/")
            else shutil.which(self.program, path=search) is not None
        )


CONTROL_PLANE = (Need("openssl", "openssl", "keys and certificates"),)
NODES = (
    *CONTROL_PLANE,
    Need("runc", "runc", "runs containers"),
    Need("/usr/lib/cni/bridge", "containernetworking-plugins", "the pods' network"),
    Need("iptables", "iptables", "services and the way out"),
    Need("ip", "iproute2", "the nodes' network"),
    Need("nsenter", "util-linux", "enters a node"),
    Need("mount", "mount", "volumes"),
    Need("sysctl", "procps", "forwarding inside a node"),
)
IMAGES = (
    Need("buildah", "buildah", "builds images from Dockerfiles"),
    Need("debootstrap", "debootstrap", "makes the base image"),
)
TESTS = (
    Need("redis-server", "redis-server", "keeps the coordinator's state; tests start their own"),
    Need(
        "prometheus",
        "prometheus",
        "scrapes metrics and answers the dashboard's queries; tests start their own",
    ),
)


def missing(needs: Sequence[Need]) -> list[Need]:
    """What is not installed."""
    return [need for need in needs if not need.met()]


def control_plane() -> None:
    """Check what a control plane alone needs; install nothing."""
    absent = missing(CONTROL_PLANE)
    if absent:
        raise ClusterError(
            _list(absent) + "\nInstall it, or run `python -m localcluster preflight` as root."
        )


def install(needs: Sequence[Need]) -> None:
    """Install the packages of what is missing, with apt-get, and say so."""
    absent = missing(needs)
    if not absent:
        return
    packages = sorted({need.package for need in absent})
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise ClusterError(
            _list(absent) + f"\nInstall them (on Debian: apt-get install {' '.join(packages)})."
        )
    say(_list(absent))
    # Programs are wanted, not services: without a runlevel for them they are not started (a Redis
    # would take its usual port).
    environment = {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    with step("apt-get update"):
        run(["apt-get", "update"], timeout_seconds=_APT_TIMEOUT_SECONDS)
    with step(f"apt-get install {' '.join(packages)}"):
        run(
            ["apt-get", "install", "-y", "--no-install-recommends", *packages],
            environment=environment,
            timeout_seconds=_APT_TIMEOUT_SECONDS,
        )


def cluster() -> None:
    """Check and install what nodes need."""
    if os.geteuid() != 0:
        raise ClusterError(
            "Nodes are network and mount namespaces, so this needs root. "
            "Without root: `up --control-plane-only`, or any cluster that KUBECONFIG names."
        )
    install(NODES)


def _list(absent: Sequence[Need]) -> str:
    return "\n".join(
        [
            "Missing:",
            *(f"    {need.package:<28} {need.purpose} ({need.program})" for need in absent),
        ]
    )
