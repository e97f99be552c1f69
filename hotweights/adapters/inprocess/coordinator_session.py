"""One worker in the coordinator's eyes, for as long as an update takes: registered, heard from, and
told what is decided.

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
from types import TracebackType
from typing import Any, Self

from hotweights.adapters.inprocess.errors import NotApplied
from hotweights_coordinator.client.client import Client
from hotweights_coordinator.wire.messages import CallRefused, CoordinatorError

logger = logging.getLogger("hotweights.part")
HEARTBEAT_SECONDS = 1.0


def default_worker_id(kind: str) -> str:
    """A name that says where and what, and belongs to nobody else."""
    return f"{kind}-{socket.gethostname()[:64]}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


class CoordinatorSession:
    """Use it as a context manager: it takes part until it is left."""

    def __init__(self, client: Client, worker_id: str) -> None:
        self._client = client
        self.worker_id = worker_id
        self._instance = uuid.uuid4().hex
        self._changed = threading.Condition()
        self._assignment: dict[str, Any] = {}
        self._error: CoordinatorError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="hotweights-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._register()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def assignment(self) -> dict[str, Any]:
        """What is decided, as far as it was heard."""
        with self._changed:
            return self._assignment

    def precommit(self, token: int) -> None:
        """Staged, verified, and fit."""
        self._client.call("precommit", worker_id=self.worker_id, token=token)

    def commit_if_alone(self, version: str, token: int) -> None:
        """Commit what only this worker takes part in."""
        found = self._client.call("status").result
        if found.get("state") == "precommitted" and found.get("workers") == [self.worker_id]:
            with contextlib.suppress(
                CallRefused
            ):  # somebody was quicker, or joined: what is decided is heard in any case
                self._client.call("commit", version=version, token=token)

    def applied(self, version: str, digest: str, token: int) -> None:
        """It serves here."""
        self._client.call(
            "applied", worker_id=self.worker_id, version=version, digest=digest, token=token
        )

    def failed(self, reason: str, message: str, token: int) -> None:
        """It cannot be served here, for this reason; what cannot be told is logged."""
        try:
            failure = {"reason": reason, "message": message[:2000], "token": token}
            self._client.call("heartbeat", worker_id=self.worker_id, failure=failure)
        except CoordinatorError as error:
            logger.warning(
                "The coordinator could not be told of the failure (%s): %s: %s",
                error,
                reason,
                message,
            )

    def decided(self, token: int, seconds: float) -> bool:
        """Wait until the attempt ``token`` is over: True if it was committed. Raises `NotApplied`
        when that takes too long.
        """
        until = time.monotonic() + seconds
        with self._changed:
            while True:
                found = self._assignment
                current = found.get("current") or {}
                if current.get("token") == token:
                    return True
                if int(found.get("token", 0)) > token or found.get("state") not in (
                    "begun",
                    "precommitted",
                    "committed",
                ):
                    return False
                left = until - time.monotonic()
                if left <= 0:
                    text = (
                        f"attempt {token} was neither committed nor aborted within {seconds:.0f} s"
                    )
                    raise NotApplied(
                        "DecisionTimeout",
                        f"{text}{f' ({self._error})' if self._error else ''}; see `hotweights "
                        "coord-status`",
                    )
                self._changed.wait(min(left, HEARTBEAT_SECONDS))

    def _register(self) -> None:
        reply = self._client.call(
            "register",
            worker_id=self.worker_id,
            host=socket.gethostname()[:255],
            instance=self._instance,
        )
        self._note(reply.result)

    def _note(self, result: dict[str, Any]) -> None:
        with self._changed:
            self._assignment, self._error = result.get("assignment", result), None
            self._changed.notify_all()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                self._note(self._client.call("heartbeat", worker_id=self.worker_id).result)
            except CallRefused as error:
                self._hear(error)
                if error.reason == "UnknownWorker":
                    with contextlib.suppress(CoordinatorError):
                        self._register()
            except CoordinatorError as error:
                self._hear(error)

    def _hear(self, error: CoordinatorError) -> None:
        with self._changed:
            self._error = error
