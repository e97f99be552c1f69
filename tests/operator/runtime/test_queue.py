"""The queue: once however often it is said, never two at a time, paced, and patient with what
fails.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from hotweights_common.backoff import Backoff
from hotweights_operator.runtime.queue import WorkQueue


async def next_of(queue: WorkQueue[str], seconds: float = 20.0) -> str:
    async with asyncio.timeout(seconds):
        return await queue.get()


async def nothing_comes(queue: WorkQueue[str]) -> None:
    """However much time passes. What comes only after a while may have come when somebody looks
    late: there it is asked how long that took, at least.
    """
    with pytest.raises(TimeoutError):
        await next_of(queue, 0.05)


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_a_key_said_twice_comes_once() -> None:
    queue = WorkQueue[str](0.0)
    queue.add("a")
    queue.add("a")
    queue.add("b")
    assert [await next_of(queue), await next_of(queue)] == ["a", "b"]
    await nothing_comes(queue)


async def test_what_is_added_while_it_is_worked_on_comes_again_afterwards() -> None:
    queue = WorkQueue[str](0.0)
    queue.add("a")
    await next_of(queue)
    queue.add("a")
    await nothing_comes(queue)
    queue.done("a")
    assert await next_of(queue) == "a"


async def test_the_same_key_comes_at_its_pace() -> None:
    queue = WorkQueue[str](0.1)
    queue.add("a")
    key, ended = await next_of(queue), now()
    queue.done(key)
    queue.add("a")
    assert await next_of(queue) == "a"
    assert now() - ended >= 0.1


async def test_a_sooner_time_wins_over_a_later_one() -> None:
    queue = WorkQueue[str](0.0)
    queue.add("a", 60.0)
    queue.add("a", 0.01)
    queue.add("a", 30.0)
    assert await next_of(queue) == "a"
    await nothing_comes(queue)


async def test_failures_wait_longer_each_time_and_success_forgives() -> None:
    queue = WorkQueue[str](0.0, backoff=Backoff(0.001, 30.0))
    queue.add("a")
    waits = [queue.failed(await next_of(queue)) for _ in range(4)]
    assert waits == [0.001, 0.002, 0.004, 0.008]
    queue.done(await next_of(queue))
    queue.add("a")
    assert queue.failed(await next_of(queue)) == 0.001


async def test_it_knows_how_long_the_oldest_key_waits() -> None:
    queue = WorkQueue[str](0.0)
    assert (queue.depth, queue.oldest_seconds) == (0, 0.0)
    queue.add("a")
    await asyncio.sleep(0.02)
    assert queue.depth == 1
    assert queue.oldest_seconds > 0.01


async def test_a_key_whose_time_comes_while_it_is_worked_on_comes_once_and_afterwards() -> None:
    queue = WorkQueue[str](0.0)
    queue.add("a")
    await next_of(queue)
    queue.add("a", 0.01)
    await nothing_comes(queue)
    queue.done("a")
    assert await next_of(queue) == "a"
    await nothing_comes(queue)


async def test_what_is_added_while_a_key_fails_does_not_shorten_its_wait() -> None:
    queue = WorkQueue[str](0.0, backoff=Backoff(0.1, 30.0))
    queue.add("a")
    await next_of(queue)
    queue.add("a")
    ended = now()
    queue.failed("a")
    assert await next_of(queue) == "a"
    assert now() - ended >= 0.1
    await nothing_comes(queue)


async def test_a_failure_waits_as_long_as_the_api_server_asks_and_never_for_ever() -> None:
    queue = WorkQueue[str](0.0, backoff=replace(WorkQueue.backoff, first_seconds=0.001))
    queue.add("a")
    assert queue.failed(await next_of(queue), 0.01) == 0.01
    assert queue.failed(await next_of(queue)) == 0.002
    for _ in range(30):
        wait = queue.failed("a")
    assert wait == 30.0


async def test_what_keeps_the_processor_busy_comes_less_often() -> None:
    queue = WorkQueue[str](0.0)
    queue.add("a")
    key, ended = await next_of(queue), now()
    queue.done(key, busy_seconds=0.05)
    queue.add("a")
    assert await next_of(queue) == "a"
    assert now() - ended >= 0.2
