"""Two ranks switch together or not at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from e2e.engine.conftest import Engine, checkpoint, report, version
from hotweights_transports.handoff import frames


def test_two_ranks_are_one_engine(
    start: Callable[..., Engine], request: pytest.FixtureRequest
) -> None:
    old, new = checkpoint("llama", 0, shards=3), checkpoint("llama", 1, shards=2)
    arguments = ["--tensor-parallel-size", "2"]
    engine = start(old, "keep", arguments, 2, VLLM_CPU_OMP_THREADS_BIND="0|1").ready()
    assert sorted(hello.rank for hello in engine.agent.hellos if hello.role == "rank") == [0, 1]
    boot = engine.vllm.greedy()
    first, second = version(old, "v0"), version(new, "v1")
    answer = engine.agent.swap(second)
    assert answer.probe == "Ran"  # the golden tokens are of one rank, which rounds differently
    report(request, f"paused {answer.pause_seconds * 1e3:.1f} ms {answer.timings}")
    switched = engine.vllm.greedy()
    assert switched != boot
    engine.agent.swap(first)
    assert engine.vllm.greedy() == boot
    # One rank alone fails in its copy: the other has switched already, and has to come back.
    for broken in (1, 0):
        engine.agent.prepare(second)
        engine.order.write_text(f"half@{broken}")
        said = len(engine.states())
        failure = engine.agent.commit(second.digest)
        assert isinstance(failure, frames.CommitFailed)
        assert failure.dirty
        assert f"rank {broken}" in failure.message
        assert engine.repaired(said).digest == first.digest
        assert engine.vllm.greedy() == boot
    engine.agent.swap(second)
    assert engine.vllm.greedy() == switched
    # One rank has not prepared: refused, without a pause.
    rank = engine.agent.peers.pop(1)
    engine.agent.prepare(first)
    engine.agent.peers[1] = rank
    refused = engine.agent.commit(first.digest)
    assert isinstance(refused, frames.CommitFailed)
    assert (refused.reason, refused.dirty) == ("NotPrepared", False)
    assert engine.vllm.greedy() == switched
