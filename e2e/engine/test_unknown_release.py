"""A vLLM whose release nobody has tried: it serves on without Hotweights, and its pod says why."""

from __future__ import annotations

from collections.abc import Callable

from e2e.engine.conftest import Engine, assert_serves, checkpoint
from hotweights.adapters.vllm.releases import refusal
from hotweights_transports.handoff import frames

UNKNOWN = "0.99.0"


def test_an_unknown_release_is_refused_in_the_hello_and_serves_on(
    start: Callable[..., Engine],
) -> None:
    model = checkpoint("llama", 0, shards=3)
    engine = start(model, HOTWEIGHTS_SABOTAGE_RELEASE=UNKNOWN)
    engine.vllm.ready()
    engine.agent.until(lambda: engine.agent.hellos, alive=engine.vllm.alive)
    assert [(hello.role, hello.unsupported) for hello in engine.agent.hellos] == [
        ("server", refusal(UNKNOWN))
    ]
    assert_serves(engine, model)
    answer = engine.agent.commit("sha256:any")
    assert isinstance(answer, frames.CommitFailed)
    assert (answer.reason, answer.message) == ("EngineUnsupported", refusal(UNKNOWN))
    assert_serves(engine, model)
    engine.stop()
