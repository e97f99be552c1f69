"""A replication as one of the coordinator's workers: it takes part in the update that it brings
about, and leaves when that is over.

Rank 0 submits the plan, begins and commits; every rank says for itself when it has everything.
While bytes move a thread keeps this worker alive, and ends the transfer when the attempt is over
before it was done. Every no of the coordinator is an error here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hotweights.replicate.run import Stop
from hotweights.replicate.world import World
from hotweights_common.errors import HotweightsError
from hotweights_coordinator.client.client import Client
from hotweights_coordinator.wire.messages import CoordinatorError
from hotweights_planner.plan import Plan

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
POLL_SECONDS = 0.1
BEGIN_SECONDS = 60.0
SUBMIT_SECONDS = 60.0


class Aborted(HotweightsError):
    """The attempt ended before it was committed."""

    reason = "Aborted"


@dataclass(frozen=True, slots=True)
class WaitLimits:
    """How long others are waited for."""

    commit_seconds: float = 600.0
    """Until all workers have prepared the version."""


class Participant:
    """One rank's part in one update."""

    def __init__(
        self, client: Client, plan: Plan, world: World, worker_id: str, host: str, instance: str
    ) -> None:
        self._client = client
        self._plan = plan
        self._world = world
        self._me: dict[str, Any] = {"worker_id": worker_id, "host": host, "instance": instance}
        self._token = 0

    @contextmanager
    def taking_part(self, stop: Stop) -> Iterator[None]:
        """The attempt is open within; an error in it is told to the coordinator, which aborts."""
        self._client.call("register", **self._me)
        if self._world.rank == 0:
            self._client.call(
                "submit_plan", binary=self._plan.canonical, timeout_seconds=SUBMIT_SECONDS
            )
            self._token = self._client.call(
                "begin", version=self._plan.version, digest=self._plan.manifest.digest
            ).result["token"]
        else:
            self._token = self._await_begin()
        over = threading.Event()
        beating = threading.Thread(
            target=self._beat, args=(over, stop), name="heartbeat", daemon=True
        )
        beating.start()
        try:
            yield
        except (HotweightsError, OSError, KeyboardInterrupt) as error:
            over.set()
            self._give_up(error)
            raise
        finally:
            over.set()
            beating.join(BEAT_SECONDS + self._client.timeout_seconds)

    def commit(self, patience: WaitLimits | None = None) -> None:
        """Say that it is all here, wait for the others, and have it committed."""
        until = time.monotonic() + (patience or WaitLimits()).commit_seconds
        state = self._client.call(
            "precommit", worker_id=self._me["worker_id"], token=self._token
        ).result["state"]
        while state != "committed":
            if state == "precommitted" and self._world.rank == 0:
                self._client.call("commit", version=self._plan.version, token=self._token)
            elif time.monotonic() > until:
                waiting = (
                    ", ".join(self._client.call("status").result["waiting_for"][:5]) or "its commit"
                )
                raise CoordinatorError(
                    f"{self._plan.version} still waits for {waiting}; see `hotweights "
                    "coord-status`",
                    "Timeout",
                )
            else:
                time.sleep(POLL_SECONDS)
            state = self._state()
        self._client.call(
            "applied",
            worker_id=self._me["worker_id"],
            version=self._plan.version,
            digest=self._plan.manifest.digest,
            token=self._token,
        )

    def _state(self) -> str:
        now = self._client.call("status").result
        if now["state"] == "aborted" or now["token"] != self._token:
            raise Aborted(
                f"{self._plan.version} was not committed: "
                f"{now['reason'] or 'another attempt began'}"
            )
        return str(now["state"])

    def _await_begin(self) -> int:
        """Rank 0's attempt. Raises `CoordinatorError` when it does not come."""
        until = time.monotonic() + BEGIN_SECONDS
        while time.monotonic() < until:
            now = self._client.call("status").result
            if now["plan_digest"] == self._plan.digest and now["state"] in (
                "begun",
                "precommitted",
                "committed",
            ):
                return int(now["token"])
            time.sleep(POLL_SECONDS)
        raise CoordinatorError(
            f"rank 0 did not begin {self._plan.version} within {BEGIN_SECONDS:g} s", "Timeout"
        )

    def _beat(self, over: threading.Event, stop: Stop) -> None:
        while not over.wait(BEAT_SECONDS):
            try:
                answer = self._client.call("heartbeat", worker_id=self._me["worker_id"]).result
            except CoordinatorError as error:
                log.warning("%s", error)
                continue
            if answer["token"] != self._token or answer["state"] == "aborted":
                stop.because(
                    Aborted(
                        f"{self._plan.version} was given up meanwhile; see "
                        "`hotweights "
                        "coord-status`"
                    )
                )

    def _give_up(self, error: BaseException) -> None:
        """Nobody has to wait for this worker's part any more."""
        reason = error.reason if isinstance(error, HotweightsError) else "Interrupted"
        failure = {"reason": reason, "message": str(error) or "interrupted", "token": self._token}
        try:
            self._client.call("heartbeat", worker_id=self._me["worker_id"], failure=failure)
        except CoordinatorError as failed:
            log.warning("the coordinator was not told: %s", failed)
