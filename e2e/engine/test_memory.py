"""Engines in containers that have little memory left: a version gets in by another way, or is
refused; the kernel ends nobody, and everybody is answered.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from e2e.engine import images
from e2e.engine.conftest import Engine, report
from e2e.engine.launch import descendants
from e2e.harness.traffic import Traffic
from hotweights_transports.handoff import frames
from localcluster.host import cgroups
from localvllm import build, models

RESERVE_NBYTES = 256 << 20  # as `hotweights.adapters.vllm.rank.room` keeps for serving
REQUESTS = 200
PODS = 3


class Container:
    """A control group with the engine in it, and so much memory beyond what it has."""

    def __init__(self, name: str) -> None:
        self.name = name
        cgroups.create(name)
        (self.folder,) = (
            root / name
            for root in cgroups.hierarchies()
            if (root / name / "memory.limit_in_bytes").exists()
            or (root / name / "memory.max").exists()
        )

    def take_in(self, engine: Engine) -> None:
        for pid in (engine.vllm.process.pid, *descendants(engine.vllm.process.pid)):
            (self.folder / "cgroup.procs").write_text(str(pid))

    def leave(self, nbytes: int) -> None:
        """Its limit: what is in use, and so much more."""
        limit, used = self._file("memory.limit_in_bytes", "memory.max"), self._used()
        for _ in range(10):  # the kernel refuses less than what is in use by now
            try:
                limit.write_text(str(used + nbytes))
            except OSError:
                used = self._used()
            else:
                return
        raise TimeoutError(f"{limit} takes no limit")

    def _used(self) -> int:
        return int(self._file("memory.usage_in_bytes", "memory.current").read_text())

    def _file(self, *names: str) -> Path:
        (file,) = (self.folder / name for name in names if (self.folder / name).exists())
        return file


@pytest.fixture
def containers() -> Iterator[list[Container]]:
    made = [Container(f"hotweights-memory-{os.getpid()}-{pod}") for pod in range(PODS)]
    yield made
    for container in made:
        cgroups.kill(container.name)
        cgroups.remove(container.name)


@pytest.fixture(scope="module")
def large() -> list[Path]:
    """Two versions of some 100 MB in eight layers."""
    folder = build.cache() / "models" / "memory-8-512"
    made = [models.Model(folder / f"v{seed}", seed=seed, layers=8, hidden=512) for seed in (0, 1)]
    models.make_models(made)
    return [model.dir for model in made]


def test_with_little_memory_it_is_loaded_in_the_pause_or_refused(
    start: Callable[..., Engine],
    containers: list[Container],
    large: list[Path],
    request: pytest.FixtureRequest,
) -> None:
    """Of several pods at once, as on one node."""
    versions = [images.build(images.read(path), version=path.name) for path in large]
    nbytes = sum(file.stat().st_size for file in large[0].glob("*.safetensors"))
    engines = [start(large[0]) for _ in containers]
    addresses = [engine.ready().vllm.address for engine in engines]
    for engine, container in zip(engines, containers, strict=True):
        container.take_in(engine)
    with (
        Traffic(addresses, plain=2, streams=1, max_tokens=4) as traffic,
        ThreadPoolExecutor(PODS) as pods,
    ):
        switch = partial(_switch_there_and_back, versions, nbytes)
        pauses = list(pods.map(switch, engines, containers))
        deadline = time.monotonic() + 300
        while min(traffic.answered.values()) < REQUESTS // PODS and time.monotonic() < deadline:
            time.sleep(0.1)
    told = ", ".join(f"{seconds * 1e3:.0f}" for seconds in pauses)
    report(request, f"paused {told} ms for {nbytes / 1e6:.0f} MB")
    assert not traffic.failures, traffic.failures[:5]
    assert min(traffic.answered.values()) >= REQUESTS // PODS
    assert [cgroups.oom_kills(container.name) for container in containers] == [0] * PODS
    for engine in engines:
        engine.stop()


def _switch_there_and_back(
    versions: list[images.Image], nbytes: int, engine: Engine, container: Container
) -> float:
    """Of versions with so many bytes of weights. Gives the seconds of the first pause."""
    old, new = versions
    first = engine.vllm.greedy()
    container.leave(nbytes // 10)
    for wish in ({}, {"max_pause_seconds": 60.0}):
        (refused,) = engine.agent.prepare(new, **wish)
        assert isinstance(refused, frames.Rejected)
        assert refused.reason == "InsufficientMemory"
        assert "within this container's memory limit" in refused.message
        assert ("maxPauseSeconds" in refused.message) == (not wish)
    # less than a copy takes, and more than a layer; anew each time, as serving takes some too
    some = RESERVE_NBYTES + nbytes * 3 // 4
    container.leave(some)
    (refused,) = engine.agent.prepare(new)
    assert isinstance(refused, frames.Rejected), refused
    container.leave(some)
    (prepared,) = engine.agent.prepare(new, max_pause_seconds=60.0)
    assert isinstance(prepared, frames.Prepared), prepared
    assert prepared.way == "InPause"
    answer = engine.agent.commit(new.digest)
    assert isinstance(answer, frames.Committed), answer
    assert engine.vllm.greedy() != first
    container.leave(some)
    assert engine.agent.swap(old, "InPause").probe == "Ran"
    assert engine.vllm.greedy() == first
    return answer.pause_seconds
