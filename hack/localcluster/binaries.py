"""The cluster's programs, built from pinned Go modules into the cache.

No registry and no download page is needed: the Go module proxy (or a vendored copy) is the only source,
and go.sum says what it may deliver. A binary's folder carries a key over everything that went into it:
its module's go.mod and go.sum and the flags. So a changed pin builds beside the old binary, and an
unchanged one costs a stat. A build writes into a temporary folder that is renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from localcluster import paths
from localcluster.commands import run
from localcluster.errors import ClusterError
from localcluster.progress import step

_BUILD_TIMEOUT_SECONDS = 3600.0
_KEY_NDIGITS = 12
_OUR_VERSION = "v1.0.0"


@dataclass(frozen=True, slots=True)
class Binary:
    """One program: where its source is, and which module's version it carries."""

    module: str  # the folder under hack/modules
    package: str
    versioned_by: str = ""  # the module path whose required version names the binary; none for our own
    tags: str = ""
    stamp: tuple[str, ...] = ()  # the variables that take the version, major and minor

    def ldflags(self, version: str) -> str:
        """Linker flags: no symbols, and the version where the program expects to be told."""
        major, minor, *_ = version.removeprefix("v").split(".")
        values = {"gitVersion": version, "gitMajor": major, "gitMinor": minor}
        return " ".join(["-s -w", *(f"-X {name}={values[name.rpartition('.')[2]]}" for name in self.stamp)])


_KUBERNETES_STAMP = (
    "k8s.io/component-base/version.gitVersion",
    "k8s.io/component-base/version.gitMajor",
    "k8s.io/component-base/version.gitMinor",
    "k8s.io/client-go/pkg/version.gitVersion",
)


def _kubernetes(name: str) -> Binary:
    return Binary("kubernetes", f"k8s.io/kubernetes/cmd/{name}", "k8s.io/kubernetes", stamp=_KUBERNETES_STAMP)


def _containerd(name: str) -> Binary:
    module = "github.com/containerd/containerd/v2"
    return Binary("containerd", f"{module}/cmd/{name}", module, tags="no_btrfs,no_devmapper,no_zfs")


BINARIES: dict[str, Binary] = {
    "etcd": Binary("kubernetes", "go.etcd.io/etcd/server/v3", "go.etcd.io/etcd/server/v3"),
    "kube-apiserver": _kubernetes("kube-apiserver"),
    "kube-controller-manager": _kubernetes("kube-controller-manager"),
    "kube-scheduler": _kubernetes("kube-scheduler"),
    "kubectl": _kubernetes("kubectl"),
    "kubelet": _kubernetes("kubelet"),
    "kube-proxy": _kubernetes("kube-proxy"),
    "containerd": _containerd("containerd"),
    "containerd-shim-runc-v2": _containerd("containerd-shim-runc-v2"),
    "ctr": _containerd("ctr"),
    "pause": Binary("pause", "."),
    "helm": Binary("helm", "helm.sh/helm/v4/cmd/helm", "helm.sh/helm/v4"),
}

CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
NODE = ("kubelet", "kube-proxy", "containerd", "containerd-shim-runc-v2", "ctr")


def ensure(names: Iterable[str]) -> dict[str, Path]:
    """The paths of these programs, built first where the cache does not have them."""
    return {name: _ensure(name) for name in names}


def version_of(binary: Binary, modules: Path = paths.HACK / "modules") -> str:
    """The version that the binary's go.mod requires."""
    if not binary.versioned_by:
        return _OUR_VERSION
    text = (modules / binary.module / "go.mod").read_text()
    found = re.search(rf"^(?:require)?\s+{re.escape(binary.versioned_by)} (v\S+)", text, re.MULTILINE)
    if found is None:
        raise ClusterError(f"{modules / binary.module / 'go.mod'} does not require {binary.versioned_by}.")
    return found[1]


def key_of(binary: Binary, modules: Path = paths.HACK / "modules") -> str:
    """A short hash of everything that decides what the binary is."""
    folder = modules / binary.module
    digest = hashlib.sha256()
    for part in (
        (folder / "go.mod").read_bytes(),
        (folder / "go.sum").read_bytes(),
        " ".join(_build_arguments(binary, version_of(binary, modules))).encode(),
    ):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:_KEY_NDIGITS]


def _build_arguments(binary: Binary, version: str) -> list[str]:
    tags = [f"-tags={binary.tags}"] if binary.tags else []
    return ["-trimpath", "-buildvcs=false", "-mod=readonly", *tags, "-ldflags", binary.ldflags(version), binary.package]


def _ensure(name: str) -> Path:
    binary = BINARIES.get(name)
    if binary is None:
        raise ClusterError(f"There is no binary {name!r}; there are {', '.join(BINARIES)}.")
    version = version_of(binary)
    folder = paths.cache() / "bin" / f"{name}-{version}-{key_of(binary)}"
    program = folder / name
    if program.exists():
        return program
    with paths.locked(paths.cache() / "locks" / folder.name, f"building {name}", _BUILD_TIMEOUT_SECONDS):
        if not program.exists():
            with step(f"building {name} {version} (once; minutes on a small machine)"):
                _build(name, binary, version, folder)
    return program


def _build(name: str, binary: Binary, version: str, folder: Path) -> None:
    if shutil.which("go") is None:
        raise ClusterError(f"Building {name} needs Go (https://go.dev/doc/install): put `go` on PATH, then try again.")
    for left in folder.parent.glob(f"{folder.name}.unfinished-*"):
        shutil.rmtree(left)
    # Named for the process: a compiler that outlived a killed run must not write into the next one's folder.
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    run(
        ["go", "build", "-o", unfinished / name, *_build_arguments(binary, version)],
        cwd=paths.HACK / "modules" / binary.module,
        environment={"CGO_ENABLED": "0", "GOWORK": "off", "GOFLAGS": os.environ.get("GOFLAGS", "")},
        timeout_seconds=_BUILD_TIMEOUT_SECONDS,
        hint="Is the Go module proxy reachable (`go env GOPROXY`)? What was built is kept: run it again.",
    )
    unfinished.rename(folder)
