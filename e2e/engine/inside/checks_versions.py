"""The versions of a rank: where its engine sleeps, where an agent comes back, where a repair cannot
be done beside the model, and where the room for a pause has gone.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from e2e.engine.inside import odd_models
from e2e.engine.inside.odd_models import CPU, Plain, of
from hotweights.adapters.vllm.rank import reload, room, sleep_mode
from hotweights.adapters.vllm.rank.engine import Engine
from hotweights.adapters.vllm.rank.room import Room
from hotweights.adapters.vllm.rank.versions import Rejection, Versions
from hotweights.adapters.vllm.rank.ways import Wish
from hotweights_transports.handoff import frames

Tensors = dict[str, torch.Tensor]
IN_PAUSE = Wish("InPause", 60.0)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Any, Versions]]:
    """A running model of a kind, and the rank's versions of it."""

    def started(kind: type[Plain] = Plain) -> Any:
        live, config = odd_models.engine(monkeypatch, tmp_path, kind, of(1.0, 2.0))
        return live, Versions(live, config, CPU, 1.0)

    return started


def take(versions: Versions, tensors: Tensors, wish: Wish = Wish()) -> str:  # noqa: B008 - it is frozen
    built = odd_models.image_of(tensors)
    try:
        versions.take(built.digest, built.fds, wish, lambda: False)
    finally:
        built.close()
    return built.digest


def serves(live: Any) -> list[float]:
    return [float(layer.weight.detach()[0]) for layer in live.layers]


def switch(versions: Versions, tensors: Tensors, wish: Wish = Wish()) -> str:  # noqa: B008
    digest = take(versions, tensors, wish)
    versions.check(digest)
    versions.install(digest)
    return digest


def test_asleep_everything_is_refused_at_once_and_afterwards_it_works(
    start: Callable[..., Any],
) -> None:
    live, versions = start()
    digest = take(versions, of(5.0, 6.0))
    versions.fall_asleep()
    for ask in (
        lambda: versions.check(digest),
        lambda: take(versions, of(5.0, 6.0)),
        lambda: take(versions, of(7.0, 8.0)),
        lambda: versions.repair(digest),
    ):
        with pytest.raises(Rejection, match=r"the engine sleeps.*wake it") as refused:
            ask()
        assert refused.value.reason == "Busy"
    versions.wake()
    with pytest.raises(Rejection, match="is not prepared"):  # it was let go of
        versions.check(digest)
    switch(versions, of(5.0, 6.0))
    assert serves(live) == [5.0, 6.0]


def test_what_serves_can_be_handed_over_anew_while_the_engine_sleeps(
    start: Callable[..., Any],
) -> None:
    _, versions = start()
    digest = switch(versions, of(5.0, 6.0))
    versions.fall_asleep()
    assert take(versions, of(5.0, 6.0)) == digest


def test_no_sleep_begins_inside_a_commit(start: Callable[..., Any]) -> None:
    live, versions = start()
    digest = take(versions, of(5.0, 6.0))
    versions.check(digest)
    with pytest.raises(RuntimeError, match="is being committed: sleep again afterwards"):
        versions.fall_asleep()
    versions.install(digest)
    assert serves(live) == [5.0, 6.0]
    versions.fall_asleep()


class Waits(Plain):
    """Stays in its loader until it is told to go on."""

    entered, go_on = threading.Event(), threading.Event()

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta and tensor[0] == 5.0:
            self.entered.set()
            assert self.go_on.wait(50.0)
        return tensor


def test_a_sleep_waits_for_who_prepares_to_stop(start: Callable[..., Any]) -> None:
    _, versions = start(Waits)
    reasons: list[str] = []

    def prepare() -> None:
        try:
            take(versions, of(5.0, 6.0))
        except Rejection as error:
            reasons.append(error.reason)

    preparing = threading.Thread(target=prepare)
    preparing.start()
    assert Waits.entered.wait(50.0)
    sleeping = threading.Thread(target=versions.fall_asleep)
    sleeping.start()
    assert versions._call_off.wait(50.0)
    assert sleeping.is_alive(), "the model is being read"
    Waits.go_on.set()
    for thread in (preparing, sleeping):
        thread.join(50.0)
        assert not thread.is_alive()
    assert reasons == ["Busy"]
    assert versions.describe()["ready"] is None


class Worker:
    """As vLLM's."""

    def __init__(self, sleeper: Any) -> None:
        self.sleeper = sleeper
        self.did: list[Any] = []

    def sleep(self, level: int = 1) -> None:
        self.did.append(("sleep", level))

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.did.append(("wake_up", tags))


def test_a_worker_tells_its_rank_before_it_sleeps_and_after_it_woke() -> None:
    class Told(Worker):
        pass

    did: list[Any] = []
    sleeper = SimpleNamespace(
        fall_asleep=lambda: did.append("fall_asleep"), wake=lambda: did.append("wake")
    )
    for _ in range(2):
        assert sleep_mode.watch(Told, lambda worker: worker.sleeper) == ""
    worker = Told(sleeper)
    worker.did = did
    worker.sleep()
    worker.wake_up(["kv_cache"])
    worker.wake_up(tags=["weights"])
    worker.sleep(level=1)
    worker.wake_up()
    assert did == [
        "fall_asleep", ("sleep", 1), ("wake_up", ["kv_cache"]), ("wake_up", ["weights"]), "wake",
        "fall_asleep", ("sleep", 1), ("wake_up", None), "wake",
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="sleep at level 1"):
        worker.sleep(2)
    stranger = Told(None)  # with an engine of somebody else's
    stranger.sleep(2)
    assert stranger.did == [("sleep", 2)]
    assert "start the engine without --enable-sleep-mode" in sleep_mode.watch(
        object, lambda _: None
    )


@pytest.mark.parametrize("way", ["Reload", "InPause"])
def test_an_agent_that_came_back_replaces_the_memory_of_the_one_before(
    start: Callable[..., Any], way: str
) -> None:
    _, versions = start()
    if way == "Reload":
        built = odd_models.image_of(of(5.0, 6.0))
        versions._preparer._unfinishable.add(built.digest)
        built.close()
    digest = take(versions, of(5.0, 6.0), IN_PAUSE)
    assert versions.describe()["way"] == way
    first = weakref.ref(versions._image(digest))
    take(versions, of(5.0, 6.0), IN_PAUSE)
    gc.collect()
    assert first() is None
    assert versions.describe()["ready"] == digest


def test_a_repair_that_fails_beside_the_model_is_done_by_a_reload(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    live, versions = start()
    digest = switch(versions, of(5.0, 6.0))
    live.layers[0].weight.data.fill_(99.0)

    def fail(*_: Any, **__: Any) -> int:
        raise RuntimeError("a loader's")

    def put_back(model: Any, config: Any, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        model.load_weights(tensors)

    monkeypatch.setattr(versions._preparer.shadow, "load", fail)
    monkeypatch.setattr(reload, "reload", put_back)
    versions.repair(digest)
    assert serves(live) == [5.0, 6.0]


def test_where_the_room_for_a_pause_has_gone_the_version_is_prepared_again(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    live, versions = start()
    digest = take(versions, of(5.0, 6.0), IN_PAUSE)
    with monkeypatch.context() as patched:
        patched.setattr(room, "measure", lambda device: Room(0, None, "here", "give more"))
        with pytest.raises(Rejection, match=r"loading in the pause needs .*: give more") as refused:
            versions.check(digest)
    assert refused.value.reason == "NotPrepared"
    assert versions.describe()["ready"] is None
    switch(versions, of(5.0, 6.0))
    assert serves(live) == [5.0, 6.0]


@pytest.mark.parametrize(("reason", "times"), [("LoadFailed", 1), ("Busy", 0)])
def test_memory_goes_back_after_what_was_loaded_in_vain(reason: str, times: int) -> None:
    did: list[str] = []

    def refuse(*_: Any) -> None:
        raise Rejection(reason, "no")

    versions = SimpleNamespace(take=refuse, tidy=lambda: did.append("tidy"))
    rank: Any = SimpleNamespace(
        _unsupported="", _versions=versions, _orders=SimpleNamespace(released="")
    )
    connection: Any = SimpleNamespace(send=lambda frame: did.append(frame.reason))
    frame = frames.Prepare(id=1, digest="sha256:" + "0" * 64, slabs=0)
    Engine._prepare(rank, connection, frame, [])
    assert did == [reason, *["tidy"] * times]
