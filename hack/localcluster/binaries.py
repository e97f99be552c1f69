"""The cluster's programs, built from pinned Go modules into the cache.

No registry and no download page is needed: the Go module proxy (or a vendored copy) is the only
source, and go.sum says what it may deliver. A binary's folder carries a key over everything that
went into it: its module's go.mod and go.sum and the flags. So a changed pin builds beside the old
binary, and an unchanged one costs a stat. A build writes into a temporary folder; what is whole is
renamed to its place.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from localcluster import paths
from localcluster.errors import ClusterError
from localcluster.host.commands import run
from localcluster.progress import step

_BUILD_TIMEOUT_SECONDS = 3600.0
_KEY_NDIGITS = 12
_OUR_VERSION = "v1.0.0"


@dataclass(frozen=True, slots=True)
class Binary:
    """One program: where its source is, and which module's version it carries."""

    module: str  # the folder under hack/modules
    package: str
    # the module path whose required version names the binary; none for our own
    versioned_by: str = ""
    tags: str = ""
    stamp: tuple[str, ...] = ()  # the variables that take the version, major and minor

    def ldflags(self, version: str) -> str:
        """Linker flags: no symbols, and the version where the program expects to be told."""
        major, minor, *_ = version.removeprefix("v").split(".")
        values = {"gitVersion": version, "gitMajor": major, "gitMinor": minor}
        return " ".join(
            ["-s -w", *(f"-X {name}={values[name.rpartition('.')[2]]}" for name in self.stamp)]
        )


_KUBERNETES_STAMP = (
    "k8s.io/component-base/version.gitVersion",
    "k8s.io/component-base/version.gitMajor",
    "k8s.io/component-base/version.gitMinor",
    "k8s.io/client-go/pkg/version.gitVersion",
)


def _kubernetes(name: str) -> Binary:
    return Binary(
        "kubernetes", f"k8s.io/kubernetes/cmd/{name}", "k8s.io/kubernetes", stamp=_KUBERNETES_STAMP
    )


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
    programs = {name: _program(name) for name in names}
    batches: dict[tuple[str, ...], list[str]] = {}
    missing = [name for name, program in programs.items() if not program.exists()]
    for name in sorted(missing):  # two runs lock in one order
        binary = BINARIES[name]
        batches.setdefault((binary.module, *_flags(binary, version_of(binary))), []).append(name)
    for batch in batches.values():
        _build_missing({name: programs[name] for name in batch})
    return programs


def version_of(binary: Binary, modules: Path = paths.HACK / "modules") -> str:
    """The version that the binary's go.mod requires."""
    if not binary.versioned_by:
        return _OUR_VERSION
    text = (modules / binary.module / "go.mod").read_text()
    found = re.search(
        rf"^(?:require)?\s+{re.escape(binary.versioned_by)} (v\S+)", text, re.MULTILINE
    )
    if found is None:
        raise ClusterError(
            f"{modules / binary.module / 'go.mod'} does not require {binary.versioned_by}."
        )
    return found[1]


def key_of(binary: Binary, modules: Path = paths.HACK / "modules") -> str:
    """A short hash of everything that decides what the binary is."""
    folder = modules / binary.module
    digest = hashlib.sha256()
    for part in (
        (folder / "go.mod").read_bytes(),
        (folder / "go.sum").read_bytes(),
        " ".join([*_flags(binary, version_of(binary, modules)), binary.package]).encode(),
    ):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:_KEY_NDIGITS]


def _flags(binary: Binary, version: str) -> list[str]:
    tags = [f"-tags={binary.tags}"] if binary.tags else []
    return [
        "-trimpath",
        "-buildvcs=false",
        "-mod=readonly",
        *tags,
        "-ldflags",
        binary.ldflags(version),
    ]


def _program(name: str) -> Path:
    binary = BINARIES.get(name)
    if binary is None:
        raise ClusterError(f"There is no binary {name!r}; there are {', '.join(BINARIES)}.")
    return paths.cache() / "bin" / f"{name}-{version_of(binary)}-{key_of(binary)}" / name


def _build_missing(programs: dict[str, Path]) -> None:
    """Programs of one module and with the same flags: what they share is compiled once, and one
    links while another compiles.
    """
    with ExitStack() as stack:
        for name, program in programs.items():
            lock = paths.cache() / "locks" / program.parent.name
            stack.enter_context(paths.locked(lock, f"building {name}", _BUILD_TIMEOUT_SECONDS))
        missing = {name: program for name, program in programs.items() if not program.exists()}
        if missing:
            version = version_of(BINARIES[next(iter(missing))])
            with step(
                f"building {', '.join(missing)} {version} (once; minutes on a small machine)"
            ):
                _build(missing, version)


def _build(programs: dict[str, Path], version: str) -> None:
    """Build what this process holds the locks of."""
    if shutil.which("go") is None:
        raise ClusterError(
            f"Building {', '.join(programs)} needs Go (https://go.dev/doc/install): put `go` "
            "on PATH, then try again."
        )
    binaries = [BINARIES[name] for name in programs]
    first = next(iter(programs.values())).parent
    for left in first.parent.glob(f"{first.name}.unfinished-*"):
        shutil.rmtree(left)
    # Named for the process: a compiler that outlived a killed run must not write into the next
    # one's folder.
    built = first.with_name(f"{first.name}.unfinished-{os.getpid()}")
    built.mkdir(parents=True)
    run(
        [
            "go",
            "build",
            "-o",
            f"{built}/",
            *_flags(binaries[0], version),
            *(binary.package for binary in binaries),
        ],
        cwd=paths.HACK / "modules" / binaries[0].module,
        environment={
            "CGO_ENABLED": "0",
            "GOWORK": "off",
            "GOFLAGS": os.environ.get("GOFLAGS", ""),
            "GOGC": "400",  # of the compiler: a sixth of its time, for some memory
        },
        timeout_seconds=_BUILD_TIMEOUT_SECONDS,
        hint="Is the Go module proxy reachable (`go env GOPROXY`)? What was built is kept: run it "
        "again.",
    )
    for name, program in programs.items():
        unfinished = built / f"of-{name}"
        unfinished.mkdir()
        (built / _go_names(BINARIES[name])).rename(unfinished / name)
        unfinished.rename(program.parent)
    shutil.rmtree(built)


def _go_names(binary: Binary) -> str:
    """The file that `go build` writes for a package: its folder's name, a major version's left
    out.
    """
    if binary.package == ".":
        return binary.module
    *_, above, last = binary.package.split("/")
    return above if re.fullmatch(r"v\d+", last) else last
