"""What the kernel is asked for, and what its answers are taken to mean."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from pathlib import Path

import pytest

from hotweights_planner.manifest import Chunk
from hotweights_storage import linux, reader
from hotweights_storage.reader import MAX_WORKERS, SPAN_NBYTES, read_chunks
from hotweights_storage.sources.base import Source

F_SEAL_EXEC = 0x20  # linux/fcntl.h
ROOT = "sys/fs/cgroup"


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "processors"),
    [
        ("0::/\n", {}, 64),
        ("0::/\n", {f"{ROOT}/cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {f"{ROOT}/cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {f"{ROOT}/cpu.max": "10000 100000\n"}, 1),
        ("0::/pod/a\n", {f"{ROOT}/pod/cpu.max": "200000 100000", f"{ROOT}/pod/a/cpu.max": "900000 100000"}, 2),
        ("4:cpu,cpuacct:/pod\n", {f"{ROOT}/cpu/pod/cpu.cfs_quota_us": "400000\n", f"{ROOT}/cpu/pod/cpu.cfs_period_us": "100000\n"}, 4),
        ("4:cpu,cpuacct:/\n", {f"{ROOT}/cpu/cpu.cfs_quota_us": "-1\n", f"{ROOT}/cpu/cpu.cfs_period_us": "100000\n"}, 64),
    ],
    ids=["no group", "no limit", "v2", "a tenth", "the pod's", "v1", "v1 without limit"],
)  # fmt: skip
def test_a_quota_is_processors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: str,
    files: dict[str, str],
    processors: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert linux.processors(machine(tmp_path, groups, files)) == processors


def test_this_machine_has_processors() -> None:
    assert 1 <= linux.processors() <= (os.cpu_count() or 1)


def test_however_many_readers_are_asked_for_their_buffers_fit_the_reserve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(reader._Pool, "run", lambda _, workers: asked.append(workers))
    for workers in (1, 128, None):
        read_chunks(Source, list[Chunk](), lambda *_: None, workers)  # type: ignore[arg-type]
    assert asked[0] == 1
    assert max(asked) == MAX_WORKERS
    assert MAX_WORKERS * SPAN_NBYTES <= 128 << 20


@pytest.mark.parametrize(
    ("soft", "hard", "then"),
    [(1024, 524288, 524288), (1024, 1 << 30, 1 << 20), (1024, -1, 1 << 20), (2000, 2000, 2000)],
)
def test_all_descriptors_that_the_hard_limit_allows_may_be_used(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, then: int
) -> None:
    limit = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limit[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, found: limit.append(found))
    assert linux.raise_descriptor_limit() == then
    assert limit[-1] == (then, hard)


def test_more_is_never_made_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 22, 1 << 22))
    monkeypatch.setattr(resource, "setrlimit", None)
    assert linux.raise_descriptor_limit() == 1 << 22


def opened(name: str) -> tuple[int, int]:
    writer, reading = linux.anonymous_memory(name, 4096)
    try:
        seals = fcntl.fcntl(reading, fcntl.F_GET_SEALS)
        return os.fstat(reading).st_mode & 0o111, seals
    finally:
        os.close(writer)
        os.close(reading)


def test_memory_is_never_executable_and_an_old_kernel_does_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``vm.memfd_noexec=2`` refuses a memfd that does not say so."""
    create, flags = os.memfd_create, []

    def old(name: str, flag: int) -> int:
        flags.append(flag)
        if flag & linux.MFD_NOEXEC_SEAL:
            raise OSError(errno.EINVAL, "Invalid argument")
        return create(name, flag)

    def strict(name: str, flag: int) -> int:
        if not flag & linux.MFD_NOEXEC_SEAL:
            raise PermissionError(errno.EACCES, "Permission denied")
        return create(name, flag)

    monkeypatch.setattr(os, "memfd_create", old)
    opened("old")
    assert [bool(flag & linux.MFD_NOEXEC_SEAL) for flag in flags] == [True, False]
    assert all(flag & os.MFD_ALLOW_SEALING for flag in flags)
    monkeypatch.setattr(os, "memfd_create", strict)
    try:
        executable, seals = opened("strict")
    except PermissionError:
        pytest.skip("this kernel is older than 6.3")
    assert not executable
    assert seals & F_SEAL_EXEC
