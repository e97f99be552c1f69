"""A worker for as long as one update takes, on a thread of its own: registered, heard from, and told
what is decided.

While it lasts, the coordinator's commit waits for this worker's word. What is decided comes with
every heartbeat's answer; nothing here depends on an event. It knows no tensors.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from hotweights_coordinator.client.client import Client
from hotweights_coordinator.client.participation import Participation
from hotweights_coordinator.wire.messages import CallRefused, CoordinatorError

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
"""A fifteenth of the coordinator's default TTL: it takes a stopped process to be forgotten."""
MAX_FAILURE_CHARS = 2000  # of the 4096 that a call may carry: some are escaped to two bytes
OPEN = ("begun", "precommitted")
"""The states of an attempt that nothing is decided about yet."""


def default_worker_id(kind: str) -> str:
    """A name that says where and what, and belongs to nobody else."""
    return f"{kind}-{socket.gethostname()[:64]}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


class WorkerSession:
    """Use it as a context manager: it takes part until it is left. Entering raises
    `CoordinatorError` where no coordinator takes it in. Every method may be called from any thread.
    """

    def __init__(
        self,
        client: Client,
        worker_id: str,
        *,
        host: str = "",
        instance: str = "",
        heard: Callable[[dict[str, Any]], None] | None = None,
        leaves: bool = False,
    ) -> None:
        """``heard`` gets every answer's assignment, on the heartbeat's thread. One that ``leaves``
        says so in the end: the next attempt does not wait for it until it counts as silent.
        """
        self._client = client
        self._participation = Participation(
            worker_id, host or socket.gethostname(), instance or uuid.uuid4().hex
        )
        self._heard = heard
        self._leaves = leaves
        self._changed = threading.Condition()
        self._assignment: dict[str, Any] = {}
        self.error: CoordinatorError | None = None
        """Why the last heartbeat was not answered; None: it was."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hotweights-heartbeat", daemon=True)

    @property
    def worker_id(self) -> str:
        """Its name at the coordinator."""
        return self._participation.worker_id

    def __enter__(self) -> Self:
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stop.set()
        # It may be in the middle of a call that nobody answers.
        self._thread.join(HEARTBEAT_SECONDS + self._client.timeout_seconds)
        # a heartbeat after it would register anew
        if self._leaves and not self._thread.is_alive():
            with contextlib.suppress(CoordinatorError):  # then it falls silent
                self._client.call("leave", worker_id=self.worker_id)

    @property
    def assignment(self) -> dict[str, Any]:
        """What is decided, as far as it was heard."""
        with self._changed:
            return self._assignment

    def precommit(self, token: int) -> str:
        """Staged, verified, and fit; gives the attempt's state with that in it."""
        reply = self._client.call("precommit", worker_id=self.worker_id, token=token)
        return str(reply.result["state"])

    def commit_if_alone(self, version: str, token: int) -> None:
        """Commit what only this worker takes part in."""
        found = self._client.call("status").result
        if found.get("state") == "precommitted" and found.get("workers") == [self.worker_id]:
            # Somebody was quicker, or joined: what is decided is heard in any case.
            with contextlib.suppress(CallRefused):
                self._client.call("commit", version=version, token=token)

    def applied(self, version: str, digest: str, token: int) -> None:
        """It serves here."""
        self._client.call(
            "applied", worker_id=self.worker_id, version=version, digest=digest, token=token
        )

    def failed(self, reason: str, message: str, token: int) -> None:
        """It cannot be served here, for this reason; what cannot be told is logged."""
        failure = {"reason": reason, "message": message[:MAX_FAILURE_CHARS], "token": token}
        try:
            self._client.call("heartbeat", worker_id=self.worker_id, failure=failure)
        except CoordinatorError as error:
            log.warning(
                "the coordinator was not told of the failure (%s): %s: %s", error, reason, message
            )

    def decided(self, token: int, seconds: float) -> bool | None:
        """Wait until the attempt ``token`` is over: True if it was committed, False if it was given
        up, None if that takes longer than ``seconds``.
        """
        until = time.monotonic() + seconds
        with self._changed:
            while True:
                found = self._assignment
                current = found.get("current") or {}
                if current.get("token") == token:
                    return True
                another = int(found.get("token", 0)) > token
                if another or found.get("state") not in (*OPEN, "committed"):
                    return False
                left = until - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(min(left, HEARTBEAT_SECONDS))

    def _run(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                self._beat()
            except CoordinatorError as error:
                log.warning("%s", error)
                with self._changed:
                    self.error = error
                if self._participation.is_forgotten(error):
                    with contextlib.suppress(CoordinatorError):  # the next turn tries it again
                        self._beat()

    def _beat(self) -> None:
        method, arguments = self._participation.next_call()
        result = self._client.call(method, **arguments).result
        self._participation.answered()
        with self._changed:
            self._assignment, self.error = result.get("assignment", result), None
            self._changed.notify_all()
            now = self._assignment
        if self._heard is not None:
            self._heard(now)
