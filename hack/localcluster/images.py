"""Container images without a registry: pause, a Debian base, and builds from Dockerfiles, each as a
tar.

buildah builds without a daemon. Its storage is ours, in the cache. The Dockerfile gets its base
image as the build argument BASE, so that the same file builds on a public base elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from localcluster import archive, binaries, paths
from localcluster.host import hostsetup, preflight
from localcluster.host.commands import run
from localcluster.nodeconfig import PAUSE_IMAGE
from localcluster.progress import step

BASE_IMAGE = "localhost/hotweights-base:1"

_BASE_PACKAGES = "python3,python3-venv,ca-certificates"
_BUILD_TIMEOUT_SECONDS = 1800.0
_LOCK_TIMEOUT_SECONDS = 3600.0
_KEY_NDIGITS = 12


def folder() -> Path:
    """Where the archives are."""
    images = paths.cache() / "images"
    images.mkdir(exist_ok=True)
    return images


def pause() -> Path:
    """The archive of the pause image."""
    program = binaries.ensure(["pause"])["pause"]
    path = folder() / f"{program.parent.name}.tar"
    if not path.exists():
        archive.write_image(path, PAUSE_IMAGE, {"pause": program.read_bytes()}, ["/pause"])
    return path


def base() -> Path:
    """The archive of the base image: Debian with Python and nothing else. Made once."""
    key = hashlib.sha256(f"{hostsetup.DEBIAN_SUITE} {_BASE_PACKAGES}".encode()).hexdigest()[
        :_KEY_NDIGITS
    ]
    path = folder() / f"hotweights-base-{key}.tar"
    if path.exists():
        return path
    preflight.install(preflight.IMAGES)
    with paths.locked(folder() / "lock", "building an image", _LOCK_TIMEOUT_SECONDS):
        if not path.exists():
            with step("making the base image (once; a minute or two)"):
                _make_base(path)
    return path


def build(
    context: Path,
    tag: str,  # such as localhost/hotweights-agent:dev
    *,
    dockerfile: Path | None = None,  # by default the context's
    arguments: Mapping[str, str] | None = None,
    inputs: Sequence[Path] = (),  # what the build reads of the context, by default all of it
) -> Path:
    """Build a Dockerfile on our base; gives back the archive, to be loaded into nodes. What is
    unchanged is not built.
    """
    base_archive = base()
    name = tag.rpartition("/")[2].replace(":", "-")
    key = _key(
        sorted({dockerfile or context / "Dockerfile", *(inputs or [context])}),
        {"base": base_archive.name, **(arguments or {})},
    )
    path = folder() / f"{name}-{key}.tar"
    if path.exists():
        return path
    words = ["--build-arg", f"BASE={BASE_IMAGE}"]
    for argument, value in {**hostsetup.proxies(), **(arguments or {})}.items():
        words += ["--build-arg", f"{argument}={value}"]
    with (
        paths.locked(folder() / "lock", "building an image", _LOCK_TIMEOUT_SECONDS),
        step(f"building {tag}"),
    ):
        _buildah("rm", "--all")  # a failed or killed build leaves its container
        if not _stored(BASE_IMAGE):  # buildah's storage was cleared, the archives were not
            _buildah("pull", f"docker-archive:{base_archive}")
        _buildah(
            "bud",
            *("--isolation", "chroot", "--network", "host"),
            *_mounts(),
            *words,
            *("--tag", tag, "--file", dockerfile or context / "Dockerfile"),
            context,
        )
        # and no tag's that only begins alike
        for old in folder().glob(f"{name}-{'[0-9a-f]' * _KEY_NDIGITS}.tar"):
            old.unlink()
        _export(tag, path)
        # this storage shares nothing between images: old ones are whole copies
        _buildah("rmi", "--prune")
    return path


def _key(inputs: Sequence[Path], arguments: Mapping[str, str]) -> str:
    """A name for everything that a build reads, so that it is built again exactly when something
    changes.
    """
    state = hashlib.sha256(repr(sorted(arguments.items())).encode())
    for given in inputs:
        files = (
            sorted(file for file in given.rglob("*") if file.is_file())
            if given.is_dir()
            else [given]
        )
        for file in files:
            if "__pycache__" not in file.parts:
                state.update(f"{file.relative_to(given.parent)} {file.stat().st_mode:o}\n".encode())
                state.update(hashlib.sha256(file.read_bytes()).digest())
    return state.hexdigest()[:_KEY_NDIGITS]


def _make_base(path: Path) -> None:
    storage = paths.cache() / "buildah"
    for left in storage.glob("debian-*"):
        shutil.rmtree(left)
    root = storage / f"debian-{os.getpid()}"
    root.mkdir(parents=True)
    # In a mount namespace of its own: a killed debootstrap would leave /proc mounted in what is
    # deleted next.
    debootstrap = ("unshare", "--mount", "--propagation", "private", "debootstrap")
    source = (hostsetup.DEBIAN_SUITE, root, hostsetup.debian_mirror())
    run(
        [*debootstrap, "--variant=minbase", f"--include={_BASE_PACKAGES}", *source],
        timeout_seconds=_BUILD_TIMEOUT_SECONDS,
        hint=f"Read {root}/debootstrap/debootstrap.log.",
    )
    for leftover in ("var/cache/apt/archives", "var/lib/apt/lists"):
        for file in (root / leftover).iterdir():
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    container = _buildah("from", "scratch").strip()
    try:
        _buildah("copy", container, root, "/")
        _buildah("config", "--cmd", "/bin/bash", container)
        _buildah("commit", container, BASE_IMAGE)
    finally:
        _buildah("rm", container)
    _export(BASE_IMAGE, path)
    shutil.rmtree(root)


def _mounts() -> list[str]:
    """This machine's package index and certificate authorities, shown to the build and not kept in
    the image.
    """
    words: list[str] = []
    authorities = hostsetup.authorities()
    if authorities is not None:
        words += ["--volume", f"{authorities.resolve()}:{hostsetup.CONTAINER_AUTHORITIES}:ro"]
    config = hostsetup.pip_config()
    if config:
        file = paths.cache() / "buildah" / "pip.conf"
        paths.write_atomically(file, config)
        words += ["--volume", f"{file}:{hostsetup.CONTAINER_PIP_CONFIG}:ro"]
    return words


def _export(tag: str, path: Path) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    _buildah("push", tag, f"docker-archive:{unfinished}:{tag}")
    unfinished.rename(path)


def _stored(image: str) -> bool:
    return image in _buildah("images", "--format", "{{.Name}}:{{.Tag}}").split()


def _buildah(verb: str, *arguments: str | Path) -> str:
    storage = paths.cache() / "buildah"
    own = ("--storage-driver", "vfs", "--root", storage / "storage", "--runroot", storage / "run")
    return run(["buildah", *own, verb, *arguments], timeout_seconds=_BUILD_TIMEOUT_SECONDS)
