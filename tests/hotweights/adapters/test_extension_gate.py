"""The gate between a synchronous engine's caller and a switch: never both, calls inside calls pass,
a switch is not starved.
"""

from __future__ import annotations

import threading
import time

import pytest

from hotweights.adapters.inprocess.gate import Gate, Guarded


class Engine:
    """A client that notices when two threads are in it."""

    def __init__(self) -> None:
        self.value = 1
        self.inside = 0
        self.collisions = 0
        self.steps = 0

    def step(self) -> int:
        self.inside += 1
        self.collisions += self.inside != 1
        time.sleep(0.001)
        self.inside -= 1
        self.steps += 1
        return self.steps


class Nesting(Engine):
    """One call of it makes another one by its guard."""

    guard: Guarded

    def outer(self) -> int:
        return int(self.guard.step())


def test_a_switch_goes_before_a_caller_who_never_rests_and_is_alone() -> None:
    engine, gate, stop = Engine(), Gate(), threading.Event()
    guarded = Guarded(engine, gate)

    def call() -> None:
        while not stop.is_set():
            guarded.step()

    caller = threading.Thread(target=call)
    caller.start()
    for _ in range(20):
        assert gate.close(50.0)
        engine.step()
        gate.open()
    stop.set()
    caller.join()
    assert engine.collisions == 0
    assert engine.steps >= 20


def test_it_looks_like_the_client() -> None:
    engine = Engine()
    guarded = Guarded(engine, Gate())
    guarded.value = 7
    assert (engine.value, guarded.value) == (7, 7)
    with pytest.raises(AttributeError, match="nothing"):
        _ = guarded.nothing


def test_a_call_inside_a_call_passes_also_while_a_switch_waits() -> None:
    engine, gate = Nesting(), Gate()
    engine.guard = Guarded(engine, gate)
    assert engine.guard.outer() == 1
    closed: list[bool] = []
    with gate.call():
        switch = threading.Thread(target=lambda: closed.append(gate.close(50.0)))
        switch.start()
        while not gate._next.locked():
            time.sleep(0.001)
        assert engine.guard.step() == 2
    switch.join()
    assert closed == [True]
    gate.open()
    assert engine.guard.step() == 3


def test_who_waits_too_long_is_told_and_blocks_nobody() -> None:
    gate = Gate()
    with gate.call():
        refused: list[bool] = []
        switch = threading.Thread(target=lambda: refused.append(gate.close(0.01)))
        switch.start()
        switch.join()
    assert refused == [False]
    with gate.call():
        pass


def test_a_dead_engine_answers_nobody() -> None:
    gate = Gate()
    guarded = Guarded(Engine(), gate)
    gate.fail(RuntimeError("given up"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="given up"):
            guarded.step()
    assert gate.close(1.0)
