"""A replication as one of the coordinator's workers: it takes part in the update that it brings
about, and leaves when that is over.

Rank 0 submits the plan, begins and commits; every rank says for itself when it has everything.
While bytes move, heartbeats keep this worker alive, and end the transfer when the attempt is over
before it was done. Every no of the coordinator is an error here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hotweights.replicate.run import Stop
from hotweights.replicate.world import World
from hotweights_common.errors import HotweightsError
from hotweights_common.reasons import Reason
from hotweights_coordinator.client.client import Client
from hotweights_coordinator.client.worker_session import OPEN, WorkerSession
from hotweights_coordinator.wire.messages import CoordinatorError
from hotweights_planner.plan import Plan

POLL_SECONDS = 0.1  # between two questions to the coordinator
BEGIN_SECONDS = 60.0  # until rank 0 has submitted a plan, which may take as long
SUBMIT_SECONDS = 60.0  # a plan may have hundreds of MB


class Aborted(HotweightsError):
    """The attempt ended before it was committed."""

    reason = Reason.ABORTED


@dataclass(frozen=True, slots=True)
class WaitLimits:
    """How long others are waited for."""

    commit_seconds: float = 600.0
    """Until all workers have prepared the version."""


class Participant:
    """One rank's part in one update. Methods are for the thread that replicates; heartbeats go on
    in one of the session's own.
    """

    def __init__(
        self, client: Client, plan: Plan, world: World, worker_id: str, host: str, instance: str
    ) -> None:
        self._client = client
        self._plan = plan
        self._world = world
        self._stop: Stop | None = None
        self._session = WorkerSession(
            client, worker_id, host=host, instance=instance, heard=self._heard, leaves=True
        )
        self._token = 0

    @contextmanager
    def taking_part(self, stop: Stop) -> Iterator[None]:
        """The attempt is open within; an error in it is told to the coordinator, which aborts.
        ``stop`` ends the transfer when the attempt is over. Raises `CoordinatorError`.
        """
        with self._session:
            if self._world.rank == 0:
                self._client.call(
                    "submit_plan", binary=self._plan.canonical, timeout_seconds=SUBMIT_SECONDS
                )
                begun = self._client.call(
                    "begin", version=self._plan.version, digest=self._plan.manifest.digest
                )
                self._token = int(begun.result["token"])
            else:
                self._token = self._await_begin()
            self._stop = stop  # from here on, what is heard is about this attempt
            try:
                yield
            except (HotweightsError, OSError, KeyboardInterrupt) as error:
                # the abort that follows is our own: the error that caused it is what counts
                self._stop = None
                reason = error.reason if isinstance(error, HotweightsError) else "Interrupted"
                self._session.failed(reason, str(error) or "interrupted", self._token)
                raise

    def commit(self, patience: WaitLimits | None = None) -> None:
        """Say that it is all here, wait for the others, and have it committed. Raises `Aborted`,
        and `CoordinatorError` when the others take too long.
        """
        until = time.monotonic() + (patience or WaitLimits()).commit_seconds
        state = self._session.precommit(self._token)
        while state != "committed":
            if state == "precommitted" and self._world.rank == 0:
                self._client.call("commit", version=self._plan.version, token=self._token)
            elif time.monotonic() > until:
                # a follower may not know
                waiting = self._client.call("status").result["waiting_for"] or []
                # Five are enough to see who; there may be thousands.
                names = ", ".join(waiting[:5]) or "its commit"
                raise CoordinatorError(
                    f"{self._plan.version} still waits for {names}; see `hotweights coord-status`",
                    Reason.TIMEOUT,
                )
            else:
                time.sleep(POLL_SECONDS)
            state = self._state()
        digest = self._plan.manifest.digest
        self._session.applied(self._plan.version, digest, self._token)

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
            is_ours = now["plan_digest"] == self._plan.digest
            if is_ours and now["state"] in (*OPEN, "committed"):
                return int(now["token"])
            time.sleep(POLL_SECONDS)
        raise CoordinatorError(
            f"rank 0 did not begin {self._plan.version} within {BEGIN_SECONDS:g} s", Reason.TIMEOUT
        )

    def _heard(self, now: Mapping[str, Any]) -> None:
        """On the heartbeat's thread: the transfer ends with the attempt that it is for."""
        if self._stop is not None and (now["token"] != self._token or now["state"] == "aborted"):
            self._stop.because(
                Aborted(
                    f"{self._plan.version} was given up meanwhile; see `hotweights coord-status`"
                )
            )
