"""Bytes that come from many threads."""

from __future__ import annotations

import threading

import pytest

from hotweights_agent.staging import progress
from hotweights_agent.staging.progress import ByteCounter


def test_nothing_is_lost_between_threads_and_little_is_told() -> None:
    told: list[int] = []
    count = ByteCounter(told.append)

    def work() -> None:
        for _ in range(1000):
            count.add(3)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count.nbytes == 24_000
    assert len(told) < 100


def test_it_tells_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TELL_SECONDS", 3600.0)  # not twice, however slow the machine is
    told: list[int] = []
    count = ByteCounter(told.append)
    count._told_at -= progress.TELL_SECONDS
    count.add(5)
    count.add(2)
    assert told == [5]
