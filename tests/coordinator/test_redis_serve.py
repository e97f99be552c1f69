"""``hotweights coord-serve`` on Redis, as its operator meets it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotweights_coordinator.client.client import Client
from hotweights_coordinator.wire.messages import CoordinatorError
from tests.coordinator.ha.members import Coordinator
from tests.coordinator.ha.redis_server import RedisServer

LEASE_SECONDS = 60.0  # longer than anybody here waits
PATIENCE_SECONDS = 50.0

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Coordinator, Coordinator]]:
    redis = RedisServer(tmp_path)
    redis.start()
    pair = tuple(
        Coordinator(name, redis.url, "serve", LEASE_SECONDS, tmp_path) for name in ("a", "b")
    )
    try:
        for one in pair:
            one.start()
        yield pair[0], pair[1]
    finally:
        for one in pair:
            one.kill()
        redis.stop()


def statuses(pair: tuple[Coordinator, ...]) -> dict[str, dict[str, object]]:
    """What each says that answers."""
    found = {}
    for one in pair:
        with Client(one.endpoint, "", timeout_seconds=5.0) as client:
            try:
                found[one.endpoint] = client.call("status").result
            except CoordinatorError:
                continue
    return found


def until_one_leads(pair: tuple[Coordinator, ...]) -> dict[str, dict[str, object]]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        found = statuses(pair)
        if len(found) == len(pair) and any(one["leads"] for one in found.values()):
            return found
        assert time.monotonic() < deadline, found


def test_a_follower_says_who_leads_and_takes_over_at_once_from_one_that_ends(
    pair: tuple[Coordinator, Coordinator],
) -> None:
    found = until_one_leads(pair)
    (leader,) = [one for one in pair if found[one.endpoint]["leads"]]
    (other,) = [one for one in pair if one is not leader]
    assert found[other.endpoint]["leader"] == leader.endpoint
    assert found[other.endpoint]["backend"] == "redis"
    leader.stop()
    assert until_one_leads((other,))[other.endpoint]["leader"] == other.endpoint


def test_without_its_redis_it_does_not_start() -> None:
    environment = os.environ | {
        "HOTWEIGHTS_COORD_BACKEND": "redis",
        "HOTWEIGHTS_REDIS_URL": "redis://127.0.0.1:1/0",
    }
    done = subprocess.run(
        [
            Path(sys.executable).parent / "hotweights",
            "coord-serve",
            "--endpoint",
            "tcp://127.0.0.1:0",
            "--metrics-port=0",
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Redis at redis://127.0.0.1:1/0: ")
    assert line.endswith("; start it, or set $HOTWEIGHTS_REDIS_URL")
