"""Who may stage when places are few."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

from hotweights_agent.staging.places import Places
from hotweights_storage.errors import Cancelled

SECONDS = 50.0  # what no thread here takes for anything, while the machine is busy


class Job(threading.Thread):
    """Takes a place and keeps it until it is told to go."""

    def __init__(self, places: Places, digest: str) -> None:
        super().__init__(daemon=True)
        self.places, self.digest = places, digest
        self.began, self.go, self.cancel = threading.Event(), threading.Event(), threading.Event()

    def run(self) -> None:
        with (
            contextlib.suppress(Cancelled),
            self.places.place(self.digest, self.cancel, time.monotonic() + SECONDS),
        ):
            self.began.set()
            self.go.wait(SECONDS)


@contextlib.contextmanager
def jobs(places: Places, *digests: str) -> Iterator[list[Job]]:
    """They come in this order."""
    made = [Job(places, digest) for digest in digests]
    for job in made:
        job.start()
        _until(lambda job=job: job.began.is_set() or job.digest in places._waiting)
    yield made
    for job in made:
        job.cancel.set()
        job.go.set()
        job.join()


def _until(condition: object) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_places_are_few_and_come_in_turn() -> None:
    with jobs(Places(1, idle_seconds=3600.0), "a", "b", "c") as (a, b, c):
        a.go.set()
        assert b.began.wait(SECONDS)
        assert not c.began.is_set()


def test_what_a_pod_waits_for_waits_for_nothing_else() -> None:
    places = Places(1, idle_seconds=3600.0)
    with jobs(places, "prefetched", "another", "booting") as (_, another, booting):
        places.prefer({"booting"})
        assert booting.began.wait(SECONDS)
        assert not another.began.is_set()
        with jobs(places, "booting too") as (second,):
            places.prefer({"booting", "booting too"})
            booting.go.set()
            assert second.began.wait(SECONDS)


def test_one_that_gets_nothing_keeps_nobody_waiting() -> None:
    with jobs(Places(1, idle_seconds=0.2), "hangs", "healthy") as (_, healthy):
        assert healthy.began.wait(SECONDS)


def test_one_that_gets_bytes_keeps_its_place() -> None:
    places = Places(1, idle_seconds=SECONDS)
    with places.place("moves", threading.Event(), 0.0) as moved:
        places._waiting.append("waits")
        (one,) = places._staging
        assert not places._may_begin("waits", one.moved_at + SECONDS - 0.1)
        assert places._may_begin("waits", one.moved_at + SECONDS)
        one.moved_at = 0.0
        moved()
        assert not places._may_begin("waits", time.monotonic())


def test_a_wait_can_be_called_off_and_ends_with_its_deadline() -> None:
    places, cancel = Places(1, idle_seconds=3600.0), threading.Event()
    with places.place("a", cancel, time.monotonic() + 1):
        cancel.set()
        with pytest.raises(Cancelled, match="waited for its turn"):
            _wait(places, cancel, time.monotonic() + 1)
        with pytest.raises(Cancelled) as caught:
            _wait(places, threading.Event(), time.monotonic())
    assert caught.value.reason == "DeadlineExceeded"
    _wait(places, threading.Event(), time.monotonic() + 1)


def _wait(places: Places, cancel: threading.Event, deadline: float) -> None:
    with places.place("b", cancel, deadline):
        pass
