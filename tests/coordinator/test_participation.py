"""A worker registers once, and again when it was forgotten; what it is told ends with the attempt."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from hotweights_coordinator.client.participation import Participation
from hotweights_coordinator.client.worker_session import WorkerSession
from hotweights_coordinator.wire.messages import METHODS, CallRefused, CoordinatorUnreachable
from tests.coordinator.running import begun, running


def test_it_registers_first_and_again_when_it_was_forgotten() -> None:
    worker = Participation("w", "h" * 300, "instance", zone="z", endpoints=("tcp://h:1",))
    method, arguments = worker.next_call(have=("sha256:" + "0" * 64,))
    assert method == "register"
    assert METHODS[method].model_validate(arguments)  # what is too long for a call is cut
    assert worker.answered()
    failure = {"reason": "Failed", "message": "why"}
    method, arguments = worker.next_call(have=None, applied=None, failure=failure)
    assert (method, arguments["failure"]) == ("heartbeat", failure)
    assert METHODS[method].model_validate(arguments)
    assert not worker.answered()
    assert not worker.is_forgotten(CoordinatorUnreachable("nobody"))
    assert worker.next_call()[0] == "heartbeat"
    assert worker.is_forgotten(CallRefused("UnknownWorker", "who?"))
    assert worker.next_call()[0] == "register"


@pytest.mark.timeout(120)
def test_a_session_is_heard_again_after_it_was_dropped() -> None:
    heard: list[dict[str, Any]] = []
    with (
        running(worker_ttl_seconds=0.5) as coordinator,
        coordinator.client() as client,
        WorkerSession(client, "w", heard=heard.append),
    ):
        end = time.monotonic() + 60.0
        # Its heartbeats come every second, so after each it is dropped, and then it registers anew.
        while len(heard) < 3 and time.monotonic() < end:
            threading.Event().wait(0.05)
        assert len(heard) >= 3
        assert heard[-1]["state"] == heard[0]["state"]


def test_a_session_that_leaves_holds_up_nobody() -> None:
    with running() as coordinator, coordinator.client() as client:
        with WorkerSession(client, "stays"), WorkerSession(client, "w", leaves=True):
            assert client.call("status").result["workers"] == ["stays", "w"]
        assert client.call("status").result["workers"] == ["stays"]
        token = begun(client)
        assert client.call("precommit", worker_id="stays", token=token).result["state"] == (
            "precommitted"
        )
        again = client.call("leave", worker_id="w").result  # its answer may have got lost
        assert again == {"state": "precommitted", "token": token}
