"""The boot barrier: what a container that starts serves, and when its port answers."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from e2e.engine.agent import Gone
from e2e.engine.conftest import Engine, assert_serves, checkpoint, told_apart, version
from hotweights.adapters.vllm.releases import refusal
from hotweights_transports.handoff import frames

UNKNOWN = "0.99.0"


def test_hold_waits_for_the_right_version(start: Callable[..., Engine]) -> None:
    old, new = checkpoint("llama", 0, shards=3), checkpoint("llama", 1, shards=2)
    told_apart(old, new)
    engine = start(old, None, HOTWEIGHTS_BOOT_TIMEOUT_SECONDS="1")
    engine.connected()
    for _ in range(5):
        assert not engine.vllm.healthy()  # long past the time-out
        time.sleep(0.5)
    image = version(new, "v1")
    engine.agent.swap(image)
    engine.vllm.ready(300)
    assert_serves(engine, new)
    # Killed in the middle of a commit: nobody is told "committed", and the connection says that it
    # has gone.
    back = version(old, "v0")
    engine.agent.prepare(back)
    engine.order.write_text("slow")
    frame = engine.agent.start_commit(back.digest)
    engine.takes_its_order()
    engine.vllm.process.kill()
    with pytest.raises(Gone):
        raise AssertionError(engine.agent.answer_of(frame))
    engine.stop()


def test_serve_opens_after_the_time_out_and_takes_a_version_later(
    start: Callable[..., Engine],
) -> None:
    old, new = checkpoint("llama", 0, shards=3), checkpoint("llama", 1, shards=2)
    told_apart(old, new)
    engine = start(
        old,
        None,
        HOTWEIGHTS_BOOT_TIMEOUT_SECONDS="1",
        HOTWEIGHTS_BOOT_POLICY="Serve",
        HOTWEIGHTS_REPAIR_SECONDS="60",
    )
    engine.ready()
    assert_serves(engine, old)
    # A failure on the way from what it booted: repaired from the model's path.
    image = version(new, "v1")
    engine.agent.prepare(image)
    engine.order.write_text("half")
    said = len(engine.states())
    answer = engine.agent.commit(image.digest)
    assert isinstance(answer, frames.CommitFailed)
    assert answer.dirty
    assert engine.repaired(said).digest is None
    assert_serves(engine, old)
    # A failure that cannot be repaired: the process ends itself, with an error.
    engine.agent.prepare(image)
    engine.order.write_text("always")
    answer = engine.agent.commit(image.digest)
    assert isinstance(answer, frames.CommitFailed)
    assert answer.dirty
    assert engine.vllm.process.wait(120) == 1


def test_an_unknown_release_is_refused_in_the_hello_and_serves_on(
    start: Callable[..., Engine],
) -> None:
    model = checkpoint("llama", 0, shards=3)
    engine = start(model, HOTWEIGHTS_SABOTAGE_RELEASE=UNKNOWN, HOTWEIGHTS_BOOT_POLICY="Serve")
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
