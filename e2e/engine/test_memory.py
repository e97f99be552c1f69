"""An engine in a container that has little memory left: a version gets in by another way, or is
refused; the kernel ends nobody, and everybody is answered.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
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


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    made = Container(f"hotweights-memory-{os.getpid()}")
    yield made
    cgroups.kill(made.name)
    cgroups.remove(made.name)


@pytest.fixture(scope="module")
def large() -> list[Path]:
    """Two versions of some 100 MB in eight layers."""
    folder = build.cache() / "models" / "memory-8-512"
    made = [models.Model(folder / f"v{seed}", seed=seed, layers=8, hidden=512) for seed in (0, 1)]
    models.make_models(made)
    return [model.dir for model in made]


def test_with_little_memory_it_is_loaded_in_the_pause_or_refused(
    start: Callable[..., Engine],
    container: Container,
    large: list[Path],
    request: pytest.FixtureRequest,
) -> None:
    old, new = (images.build(images.read(path), version=path.name) for path in large)
    nbytes = sum(file.stat().st_size for file in large[0].glob("*.safetensors"))
    engine = start(large[0]).ready()
    first = engine.vllm.greedy()
    container.take_in(engine)
    with Traffic([engine.vllm.address], plain=2, streams=1, max_tokens=4) as traffic:
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
        second = engine.vllm.greedy()
        assert second != first
        container.leave(some)
        assert engine.agent.swap(old, "InPause").probe == "Ran"
        assert engine.vllm.greedy() == first
        deadline = time.monotonic() + 300
        while traffic.requests < REQUESTS and time.monotonic() < deadline:
            time.sleep(0.1)
    report(request, f"paused {answer.pause_seconds * 1e3:.0f} ms for {nbytes / 1e6:.0f} MB")
    assert not traffic.failures, traffic.failures[:5]
    assert traffic.requests >= REQUESTS
    assert cgroups.oom_kills(container.name) == 0
    engine.stop()
