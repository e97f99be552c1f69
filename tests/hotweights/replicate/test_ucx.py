"""Ranks that replicate one plan over UCX: byte-equal, pipelined, and ended in bounded time by
whatever goes wrong.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np
import pytest
from safetensors.numpy import save_file

from hotweights.replicate.ucx import RankMissing, hosts_of, replicator
from hotweights.replicate.world import Measured, World
from hotweights_planner.errors import Refused
from hotweights_planner.plan import Plan, build
from hotweights_storage.errors import SourceRefused, SourceUnavailable, TransferError
from hotweights_storage.image import Image, ImageBuilder
from hotweights_storage.resolve import publish
from hotweights_storage.sources.base import Root, Source
from hotweights_storage.sources.file import FileOpener
from tests.ports import free_ports

TENSORS = 12
TENSOR_NBYTES = 1_000_000
SECONDS = 60.0

pytestmark = pytest.mark.timeout(200)  # the demo starts two processes that import everything


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a folder with blanks"
    folder.mkdir()
    random = np.random.default_rng(1)
    tensors = {
        f"layer.{number}": random.integers(0, 255, TENSOR_NBYTES, np.uint8)
        for number in range(TENSORS)
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def opener(folder: Path) -> Callable[[], Source]:
    return lambda: FileOpener([Root(folder)]).open(folder.as_uri(), "")


@pytest.fixture
def plan(folder: Path, opener: Callable[[], Source]) -> Plan:
    with opener() as source:
        manifest = publish(source, "model", "v1")
    return build(manifest, None, folder.as_uri(), 4_000_000)


@pytest.fixture
def port() -> int:
    """Free, and with a few free ones behind it: one for each rank."""
    return free_ports(4)[0]


def no_source() -> Source:
    raise TransferError("this rank has no source", "SourceNotFound")


class Rank:
    def __init__(self, plan: Plan, world: World, source: Callable[[], Source] = no_source) -> None:
        self.told = 0
        self.builder = ImageBuilder(plan.manifest)
        self._plan, self._world, self._source = plan, world, source

    def run(self, join_seconds: float = SECONDS, quiet_seconds: float = SECONDS) -> Measured:
        mover = replicator(window=4, join_seconds=join_seconds, quiet_seconds=quiet_seconds)
        return mover.run(self._plan, self.builder, self._source, self._world, self._count)

    def content(self) -> list[bytes]:
        with Finished(self.builder) as image:
            return [slab.read(0, slab.nbytes) for slab in image.slabs]

    def _count(self, nbytes: int) -> None:
        self.told += nbytes


class Finished:
    def __init__(self, builder: ImageBuilder) -> None:
        self._image = builder.finish()

    def __enter__(self) -> Image:
        return self._image

    def __exit__(self, *_: object) -> None:
        self._image.close()


@pytest.fixture
def start() -> Iterator[Callable[[Rank], Future[Measured]]]:
    with ThreadPoolExecutor(4) as executor:
        yield lambda rank: executor.submit(rank.run)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_has_every_byte(
    plan: Plan,
    opener: Callable[[], Source],
    port: int,
    start: Callable[[Rank], Future[Measured]],
    size: int,
) -> None:
    ranks = [
        Rank(plan, World(size, rank, "127.0.0.1", port), opener if rank == 0 else no_source)
        for rank in range(size)
    ]
    moving = [start(rank) for rank in reversed(ranks)][::-1]
    # of all: one that fails leaves the others waiting
    failures = [one.exception(2 * SECONDS) for one in moving]
    assert failures == [None] * size
    for rank, measured in zip(ranks, moving, strict=True):
        found = measured.result()
        assert found.transport == "ucx"
        assert found.nbytes == rank.told == plan.manifest.nbytes
    first, *others = [rank.content() for rank in ranks]
    assert all(content == first for content in others)


class Torn(Source):
    """A source that is refused after its first read, as soon as somebody else has a part of it."""

    def __init__(self, source: Source, somebody: Callable[[], bool]) -> None:
        self.uri = source.uri
        self._source = source
        self._somebody = somebody

    def entries(self) -> Mapping[str, int | SourceRefused | SourceUnavailable]:
        return self._source.entries()

    def files(self) -> Mapping[str, int]:
        return self._source.files()

    def read_into(self, file: str, offset: int, into: memoryview) -> int:
        if offset > TENSOR_NBYTES:
            deadline = time.monotonic() + SECONDS
            while not self._somebody():
                if time.monotonic() > deadline:
                    raise TimeoutError("nobody has a part of it")
                time.sleep(0.01)
            raise SourceRefused("the disk is gone")
        return self._source.read_into(file, offset, into)

    def check_unchanged(self) -> None:
        self._source.check_unchanged()

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_chunks_are_passed_on_before_the_last_has_come_and_without_the_parent_the_source_helps(
    plan: Plan, opener: Callable[[], Source], port: int, start: Callable[[Rank], Future[Measured]]
) -> None:
    child = Rank(plan, World(2, 1, "127.0.0.1", port), opener)
    head = Rank(
        plan, World(2, 0, "127.0.0.1", port), lambda: Torn(opener(), lambda: child.told > 0)
    )
    failed, done = start(head), start(child)
    with pytest.raises(TransferError, match="the disk is gone"):
        failed.result(2 * SECONDS)
    found = done.result(2 * SECONDS)
    assert found.nbytes == plan.manifest.nbytes
    assert 0 < int(found.details[f"bytes from ucx://127.0.0.1:{port}"]) < plan.manifest.nbytes
    assert child.content()


def test_nobody_comes(plan: Plan, opener: Callable[[], Source], port: int) -> None:
    with pytest.raises(RankMissing, match="rank 1 did not come within"):
        Rank(plan, World(2, 0, "127.0.0.1", port), opener).run(join_seconds=0.2)
    with pytest.raises(RankMissing, match="rank 0 did not answer within"):
        Rank(plan, World(2, 1, "127.0.0.1", port), opener).run(join_seconds=0.2)


def test_another_plan_or_another_secret_is_told_from_a_rank_that_is_not_there(
    plan: Plan,
    opener: Callable[[], Source],
    port: int,
    start: Callable[[Rank], Future[Measured]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = Rank(plan, World(2, 0, "127.0.0.1", port), opener)
    monkeypatch.setenv("HOTWEIGHTS_PEER_TOKEN", "one")
    running = start(head)
    while not head.told:
        time.sleep(0.01)
    monkeypatch.setenv("HOTWEIGHTS_PEER_TOKEN", "another")
    with pytest.raises(RankMissing, match=r"knows another secret .*TokenInvalid"):
        Rank(plan, World(2, 1, "127.0.0.1", port)).run()
    monkeypatch.setenv("HOTWEIGHTS_PEER_TOKEN", "one")
    with opener() as source:
        other = build(publish(source, "model", "v2"), None, plan.source, 4_000_000)
    with pytest.raises(RankMissing, match="replicates something else"):
        Rank(other, World(2, 1, "127.0.0.1", port)).run()
    assert Rank(plan, World(2, 1, "127.0.0.1", port)).run().nbytes == plan.manifest.nbytes
    running.result(2 * SECONDS)


def test_beyond_this_host_a_secret_is_needed(
    plan: Plan, opener: Callable[[], Source], port: int
) -> None:
    with pytest.raises(Refused, match="give all ranks one secret in HOTWEIGHTS_PEER_TOKEN"):
        Rank(plan, World(2, 0, "node-a", port), opener).run()


def test_hosts() -> None:
    assert hosts_of(World(3, 0, "a")) == ["a", "a", "a"]
    assert hosts_of(World(2, 0, "a, b")) == ["a", "b"]
    with pytest.raises(Refused, match="names 2 hosts for 3 ranks"):
        hosts_of(World(3, 0, "a,b"))
    with pytest.raises(Refused, match="leaves no ports for 3 ranks"):
        hosts_of(World(3, 0, "a", 65535))


DEMO = Path(__file__).parents[3] / "scripts" / "run_ucx_broadcast_demo.sh"


@pytest.fixture
def plan_file(plan: Plan, tmp_path: Path) -> Path:
    path = tmp_path / "a plan.json"
    path.write_bytes(plan.text())
    return path


def run_demo(
    plan_file: Path, port: int, cwd: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "MASTER_PORT": str(port), **variables}
    return subprocess.run(
        [DEMO, plan_file],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


def test_the_demo_compares_what_the_ranks_have(plan_file: Path, port: int, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    ran = run_demo(plan_file, port, elsewhere)
    assert ran.returncode == 0, ran.stderr
    assert re.search(
        r"^images equal: True \(2 ranks, each verified; [\d.]+ GB/s at the "
        r"slowest\)$",
        ran.stdout,
        re.M,
    )
    assert f"rank 1: bytes from ucx://127.0.0.1:{port}: {TENSORS * TENSOR_NBYTES}" in ran.stdout
    digests = re.findall(r"^rank \d: image +(blake3:[0-9a-f]{64})$", ran.stdout, re.M)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"UCX_TLS": "nonsense"}, "UCX does not work here"),
        ({"WORLD_SIZE": "1"}, "at least two ranks"),
        ({"RANK": "7"}, "RANK: '7' is not a number from 0 to 1"),
        ({"MASTER_ADDR": "node-a"}, "one secret in HOTWEIGHTS_PEER_TOKEN"),
    ],
    ids=["no UCX", "no world", "no such rank", "no secret"],
)
def test_the_demo_fails_with_the_reason(
    plan_file: Path, port: int, tmp_path: Path, variables: dict[str, str], expected: str
) -> None:
    ran = run_demo(plan_file, port, tmp_path, **variables)
    assert ran.returncode == 1
    assert expected in ran.stderr
    assert "equal" not in ran.stdout


def test_the_demo_without_a_plan(tmp_path: Path, port: int) -> None:
    ran = run_demo(tmp_path / "none.json", port, tmp_path)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "there is no plan" in ran.stderr
