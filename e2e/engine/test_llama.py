"""One engine through everything that can happen to it, in the order of a bad day. The tests share
it. What a failure at each step leaves behind is in `failures`.

The first two begin with what was booted; each of the others says which version it begins with, so
any of them can be run alone.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from blake3 import blake3

from e2e.engine import images
from e2e.engine.conftest import (
    KIND,
    Engine,
    assert_serves,
    checkpoint,
    golden,
    report,
    version,
)
from e2e.engine.images import Image
from e2e.harness.traffic import Traffic
from e2e.soak.footprint import least
from e2e.soak.play import CACHE, ENVIRONMENT, play
from hotweights_transports.handoff import frames


@pytest.fixture(scope="module")
def engine(start: Callable[..., Engine], models: list[Path]) -> Engine:
    # what `play` asks of it
    return start(models[0], arguments=CACHE, **ENVIRONMENT).ready()


@pytest.fixture
def from_v0(engine: Engine, versions: list[Image]) -> None:
    """The engine serves v0, whatever was served before; no pause if it did already."""
    engine.agent.swap(versions[0])


@pytest.fixture
def from_v1(engine: Engine, versions: list[Image]) -> None:
    """The engine serves v1, whatever was served before; no pause if it did already."""
    engine.agent.swap(versions[1])


def test_the_port_opens_after_keep(engine: Engine, models: list[Path]) -> None:
    server = next(hello for hello in engine.agent.hellos if hello.role == "server")
    rank = next(hello for hello in engine.agent.hellos if hello.role == "rank")
    assert (server.state, server.digest, server.commit_token) == ("Booting", None, 0)
    assert (server.engine, server.token) == (KIND, "not-a-real-token")
    assert (rank.rank, rank.world_size, rank.instance) == (0, 1, server.instance)
    assert engine.agent.boots == [frames.Kept(id=1, commit_token=1)]
    engine.agent.until(lambda: engine.states() and engine.states()[-1].state == "Serving")
    assert_serves(engine, models[0])


def test_hot_equals_cold_there_and_back(
    engine: Engine, versions: list[Image], models: list[Path], request: pytest.FixtureRequest
) -> None:
    for number in (1, 0, 1):
        answer = engine.agent.swap(versions[number])
        assert answer.probe == "Golden"
        assert_serves(engine, models[number])
        report(request, f"paused {answer.pause_seconds * 1e3:.1f} ms {answer.timings}")


@pytest.mark.usefixtures("from_v1")
def test_a_probe_may_be_longer_than_a_block_of_the_cache(
    engine: Engine, models: list[Path]
) -> None:
    """A block is 16 tokens on a GPU and 128 on a CPU; the cache wants a hash of each full one."""
    prompt = [number % 250 for number in range(150)]
    asked = {"engine": KIND, "promptTokenIds": prompt}
    expected = engine.vllm.complete(prompt, 4)
    long = version(models[1], "long", probes=[{**asked, "tokenIds": expected}])
    for _ in range(2):  # the second time, the prompt's blocks lie in the cache
        assert engine.agent.swap(long).probe == "Golden"
        wrong = version(models[0], "wrong", probes=[{**asked, "tokenIds": expected}])
        said = len(engine.states())
        engine.agent.prepare(wrong)
        refused = engine.agent.commit(wrong.digest)
        assert isinstance(refused, frames.CommitFailed)
        assert refused.reason == "ProbeMismatch"
        assert engine.repaired(said).digest == long.digest
        wrong.close()
    long.close()


@pytest.mark.usefixtures("from_v1")
def test_what_is_active_already_is_committed_again_without_a_pause(
    engine: Engine, versions: list[Image]
) -> None:
    for token in (engine.agent.token, None):
        answer = engine.agent.commit(versions[1].digest, token)
        assert isinstance(answer, frames.Committed)
        assert answer.pause_seconds == 0
    assert isinstance(engine.agent.prepare(versions[1])[0], frames.Prepared)


@pytest.mark.usefixtures("from_v1")
def test_an_old_token_is_refused(engine: Engine, versions: list[Image]) -> None:
    answer = engine.agent.commit(versions[0].digest, 0)
    assert isinstance(answer, frames.CommitFailed)
    assert (answer.reason, answer.dirty) == ("StaleToken", False)
    late = engine.agent.keep(0)
    assert isinstance(late, frames.CommitFailed)
    assert late.reason == "StaleToken"


def _resized(tensors: list[images.Tensor]) -> images.Tensor:
    tensor = next(
        tensor for tensor in tensors if tensor.name.endswith("layers.1.self_attn.q_proj.weight")
    )
    rows, columns = tensor.shape
    return images.Tensor(tensor.name, tensor.dtype, [rows * 2, columns], tensor.data * 2)


def _padded(tensors: list[images.Tensor]) -> images.Tensor:
    """As an export of Megatron's: rows more than the vocabulary has."""
    tensor = next(tensor for tensor in tensors if tensor.name.endswith("embed_tokens.weight"))
    rows, columns = tensor.shape
    more = tensor.data[: len(tensor.data) // rows * 8]
    return images.Tensor(tensor.name, tensor.dtype, [rows + 8, columns], tensor.data + more)


def _retyped(tensors: list[images.Tensor]) -> images.Tensor:
    tensor = next(
        tensor for tensor in tensors if tensor.name.endswith("layers.0.mlp.up_proj.weight")
    )
    return images.Tensor(tensor.name, "I32", tensor.shape, tensor.data)


@pytest.mark.usefixtures("from_v1")
@pytest.mark.parametrize(
    ("change", "reason", "name"),
    [
        (_resized, "ShapeMismatch", "model.layers.1.self_attn.q_proj.weight"),
        (_padded, "ShapeMismatch", "model.embed_tokens.weight"),
        (_retyped, "DtypeMismatch", "model.layers.0.mlp.up_proj.weight"),
        (None, "MissingTensor", "model.layers.1.self_attn.k_proj.weight"),
        (
            lambda _: images.Tensor("model.layers.7.new.weight", "F32", [1], b"1234"),
            "UnknownTensor",
            "model.layers.7.new",
        ),
    ],
    ids=["shape", "padded", "dtype", "missing", "unknown"],
)
def test_what_does_not_fit_is_rejected_by_name(
    engine: Engine,
    models: list[Path],
    change: Callable[[list[images.Tensor]], images.Tensor] | None,
    reason: str,
    name: str,
) -> None:
    tensors = images.read(models[0])
    replaced = change(tensors) if change else None
    gone = replaced.name if replaced else name
    kept = [tensor for tensor in tensors if tensor.name != gone]
    (answer,) = engine.agent.prepare(images.build([*kept, replaced] if replaced else kept))
    assert isinstance(answer, frames.Rejected)
    assert answer.reason == reason
    assert name in answer.message
    assert_serves(engine, models[1])


@pytest.mark.usefixtures("from_v1")
def test_what_is_ready_stays_ready_whatever_else_is_asked(
    engine: Engine, versions: list[Image], models: list[Path]
) -> None:
    engine.agent.prepare(versions[0])
    assert isinstance(
        engine.agent.prepare(images.build(images.read(models[1])[1:]))[0], frames.Rejected
    )
    assert isinstance(engine.agent.prepare(versions[0])[0], frames.Prepared)
    assert isinstance(engine.agent.commit(versions[0].digest), frames.Committed)
    assert_serves(engine, models[0])


@pytest.mark.usefixtures("from_v1")
def test_a_released_version_is_forgotten(engine: Engine, versions: list[Image]) -> None:
    engine.agent.prepare(versions[0])
    assert isinstance(engine.agent.release(versions[0].digest)[0], frames.Released)
    answer = engine.agent.commit(versions[0].digest)
    assert isinstance(answer, frames.CommitFailed)
    assert answer.reason == "NotPrepared"


@pytest.mark.usefixtures("from_v1")
def test_what_serves_moves_into_younger_memory_unnoticed(
    engine: Engine, versions: list[Image], models: list[Path]
) -> None:
    """As when an agent lost its memory and staged the version anew: the old pages are let go of."""
    agent = engine.agent
    agent.down()
    agent.up()
    agent.until(agent.whole)
    assert versions[1].digest in agent.peers[0].hello.held
    (worker,) = engine.vllm.workers()
    again = version(models[1], "v1")
    assert again.digest == versions[1].digest
    assert _mapped(worker) >= _inodes(versions[1])
    assert isinstance(agent.prepare(again)[0], frames.Prepared)
    assert not _mapped(worker) & _inodes(versions[1])
    agent.release(again.digest)
    assert _mapped(worker) >= _inodes(again), "a broken switch goes back to it, whoever says what"
    assert engine.states() == [], "it has nothing to tell the agent that it connected to"
    assert_serves(engine, models[1])
    again.close()


@pytest.mark.usefixtures("from_v1")
def test_a_configuration_is_compared_by_what_it_means(engine: Engine, models: list[Path]) -> None:
    config = json.loads((models[0] / "config.json").read_text())
    newer = config | {"transformers_version": "99.0", "_commit_hash": "abc"}
    newer["dtype"] = newer.pop("torch_dtype", None) or newer.pop("dtype", None)
    same = version(models[0], "same", files=[_config(newer)])
    assert isinstance(engine.agent.prepare(same)[0], frames.Prepared)
    other = version(models[0], "other", files=[_config(newer | {"rms_norm_eps": 0.5})])
    refused = engine.agent.prepare(other)[0]
    assert isinstance(refused, frames.Rejected)
    assert refused.reason == "ConfigDiffers"
    assert f"(rms_norm_eps: {config['rms_norm_eps']} → 0.5)" in refused.message
    for image in (same, other):
        image.close()


@pytest.mark.usefixtures("from_v1")
def test_bfloat16_checkpoint_in_a_float32_engine(engine: Engine) -> None:
    model = checkpoint("llama", 2, dtype="bfloat16")
    assert engine.agent.swap(version(model, "v2")).probe == "Golden"
    assert_serves(engine, model)


@pytest.mark.usefixtures("from_v1")
def test_users_notice_nothing_but_a_short_wait(
    engine: Engine, versions: list[Image], models: list[Path], request: pytest.FixtureRequest
) -> None:
    with Traffic([engine.vllm.address], streams=2, plain=2, max_tokens=40) as traffic:
        time.sleep(3)
        calm = traffic.worst_gap()
        for number in (0, 1, 0, 1):
            began = time.monotonic()
            engine.agent.prepare(versions[number])
            prepared = time.monotonic()
            answer = engine.agent.commit(versions[number].digest, mode="Keep")
            assert isinstance(answer, frames.Committed)
            gaps = [
                traffic.worst_gap(began, prepared),
                traffic.worst_gap(prepared, time.monotonic() + 0.5),
            ]
            report(
                request,
                f"paused {answer.pause_seconds * 1e3:.1f} ms {answer.timings}; gaps {gaps}, calm "
                f"{calm:.3f}",
            )
    assert traffic.failures == []
    assert traffic.answered[engine.vllm.address] > 4, "each of four clients, and somebody again"
    assert calm > 0.0, "nobody has read a stream"
    assert_serves(engine, models[1])


@pytest.mark.usefixtures("from_v1")
def test_wait_lets_requests_end_and_gives_up_in_time(
    engine: Engine, versions: list[Image], models: list[Path]
) -> None:
    with Traffic([engine.vllm.address], streams=1, max_tokens=40) as traffic:
        time.sleep(1)
        engine.agent.prepare(versions[0])
        answer = engine.agent.commit(versions[0].digest, mode="Wait", drain_seconds=30.0)
        assert isinstance(answer, frames.Committed)
        time.sleep(0.5)
        engine.agent.prepare(versions[1])
        late = engine.agent.commit(versions[1].digest, mode="Wait", drain_seconds=0.001)
        assert isinstance(late, frames.CommitFailed)
        assert (late.reason, late.dirty) == ("DrainTimeout", False)
    assert traffic.failures == []
    assert traffic.answered[engine.vllm.address] > 2
    assert_serves(engine, models[0])


def _more_than(least: int, count: Callable[[], int]) -> bool:
    return count() > least


@pytest.mark.usefixtures("from_v0")
def test_abort_ends_requests_and_serves_on(
    engine: Engine, versions: list[Image], models: list[Path]
) -> None:
    with Traffic([engine.vllm.address], streams=1, max_tokens=200) as traffic:

        def answered() -> int:
            return traffic.answered[engine.vllm.address]

        engine.agent.until(answered, 120)
        assert traffic.failures == []
        # Both clients may be between two requests just then, so it is tried there and back.
        for turn in range(1, 9):
            engine.agent.prepare(versions[turn % 2])
            seen = traffic.streamed
            engine.agent.until(partial(_more_than, seen + 20, lambda: traffic.streamed), 60)
            committed = engine.agent.commit(versions[turn % 2].digest, mode="Abort")
            assert isinstance(committed, frames.Committed)
            before = answered()
            engine.agent.until(partial(_more_than, before, answered), 60)
            if traffic.failures:
                break
    assert 1 <= len(traffic.failures) <= 2 * turn  # each of the two clients once a turn at most
    assert {text.partition(": ")[2] for text in traffic.failures} == {"ended with abort"}
    if turn % 2 == 0:
        engine.agent.swap(versions[1])
    assert_serves(engine, models[1])


@pytest.mark.usefixtures("from_v1")
def test_a_failed_copy_is_repaired_before_anybody_is_served(
    engine: Engine, versions: list[Image], models: list[Path]
) -> None:
    engine.agent.prepare(versions[0])
    engine.order.write_text("half")
    probe = golden(models[1])[0]
    said = len(engine.states())
    frame = engine.agent.start_commit(versions[0].digest)
    answers: list[list[int]] = []
    user = threading.Thread(
        target=lambda: answers.append(engine.vllm.complete(probe["promptTokenIds"], 24))
    )
    answer = engine.agent.answer_of(frame)
    user.start()  # while it is dirty: this request has to wait for the repair
    assert isinstance(answer, frames.CommitFailed)
    assert (answer.reason, answer.dirty) == ("CommitFailed", True)
    assert "sabotage" in answer.message
    assert engine.repaired(said).digest == versions[1].digest
    user.join(180)
    assert answers == [probe["tokenIds"]]
    assert_serves(engine, models[1])
    engine.agent.swap(versions[0])
    assert_serves(engine, models[0])


@pytest.mark.usefixtures("from_v0")
def test_a_commit_ends_by_itself_when_the_agent_goes(
    engine: Engine, versions: list[Image], models: list[Path]
) -> None:
    engine.agent.prepare(versions[1])
    engine.order.write_text("slow")
    engine.agent.start_commit(versions[1].digest, version="v1")
    engine.takes_its_order()
    engine.agent.down()
    time.sleep(2.0)
    assert_serves(engine, models[1])
    before = len(engine.agent.hellos)
    engine.agent.up()
    engine.connected()
    hello = next(hello for hello in engine.agent.hellos[before:] if hello.role == "server")
    assert (hello.state, hello.digest, hello.commit_token) == (
        "Serving",
        versions[1].digest,
        engine.agent.token,
    )


@pytest.mark.usefixtures("from_v1")
def test_memory_is_flat_over_twenty_swaps(
    engine: Engine, versions: list[Image], models: list[Path], request: pytest.FixtureRequest
) -> None:
    """`make soak` is the same with two hundred."""
    probed = [(image, golden(model)) for image, model in zip(versions, models, strict=True)]
    account = play(engine, probed, 20)
    for process in account.rows[0].footprints:
        before, after = map(least, account.windows(process))
        report(request, f"{process}: {before} after ten swaps, {after} after twenty")
    assert account.problems() == []
    assert min(account.judged.values()) >= 10, "each swap waits for an answer that is judged"
    (worker,) = engine.vllm.workers()
    maps = Path(f"/proc/{worker}/maps").read_text().count("memfd:hotweights-test")
    assert maps < 1000
    assert_serves(engine, models[1])


def _config(content: dict[str, object]) -> dict[str, str]:
    """A table's entry of ``config.json``."""
    text = json.dumps(content)
    return {"name": "config.json", "blake3": blake3(text.encode()).hexdigest(), "text": text}


def _mapped(pid: int) -> set[int]:
    """Inodes of the images that a process maps."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {int(line.split()[4]) for line in lines if "memfd:hotweights-test" in line}


def _inodes(image: Image) -> set[int]:
    return {os.fstat(slab).st_ino for slab in image.fds[1:]}
