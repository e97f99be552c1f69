"""What the node's disk remembers of each pod: the version it was last told to serve, and where that
version comes from.

A container can restart while the API server is away, and an agent with it. Then this file answers
what the engine is to serve before its port opens. Tokens are remembered too, so that an older
assignment never undoes a newer one. It is small and bounded; it is replaced atomically and flushed
before the session acts on it; a file that cannot be read is set aside with a log line and
forgotten, because a wrong answer is worse than none. It refuses to know engines, sockets and the
API.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from pydantic import ValidationError

from hotweights_agent.session.assignments import SavedAssignment
from hotweights_common import files
from hotweights_common.errors import HotweightsError

log = logging.getLogger(__name__)

FORMAT = "hotweights/memory/v1"
MAX_PODS = 1024  # twice what one rollout's entry of a node holds; some 2 MB at most
MAX_FILE_BYTES = 16 * 2**20  # far more than that: a larger one is none of ours


class StateFileNotWritten(HotweightsError):
    """The disk did not take it."""


class StateFile:
    """The file of one agent. Not for several processes or threads at once."""

    def __init__(self, path: Path, max_pods: int = MAX_PODS) -> None:
        self._path = path
        self._max_pods = max_pods
        self._pods: dict[str, SavedAssignment] = {}  # the oldest change first
        self._unwritten = False

    @property
    def unwritten(self) -> bool:
        """Whether the disk lacks something that it was to remember: `retry`."""
        return self._unwritten

    @property
    def pods(self) -> tuple[SavedAssignment, ...]:
        """Everything remembered, the longest unchanged first."""
        return tuple(self._pods.values())

    def load(self) -> None:
        """Read the file; one that cannot be understood is renamed to ``*.corrupt`` and
        forgotten.
        """
        try:
            self._pods = _parse(self._path)
        except FileNotFoundError:
            self._pods = {}
        except (OSError, ValueError, TypeError, RecursionError) as error:
            aside = self._path.with_suffix(".corrupt")
            log.error(
                "what pods were to serve (%s) cannot be read and is set aside as %s: %s. "
                "Engines that restart while the API server is away will wait for it",
                self._path, aside.name, error,
            )  # fmt: skip
            self._pods = {}
            if self._path.exists():
                self._path.replace(aside)

    def save(self, *pods: SavedAssignment) -> None:
        """Write what pods are to serve. When it returns, a power cut does not undo it. Raises
        `StateFileNotWritten`.
        """
        # the same once more is no write, which would cost a flush of the disk, unless the disk
        # did not take it before
        new = [pod for pod in pods if self._pods.get(pod.uid) != pod]
        if not new:
            self.retry()
            return
        for pod in new:
            self._pods.pop(pod.uid, None)
            self._pods[pod.uid] = pod
        # those at the front were not changed for longest
        for uid in list(self._pods)[: -self._max_pods]:
            log.warning(
                "pod %s is forgotten: more than %d pods are remembered", uid, self._max_pods
            )
            del self._pods[uid]
        self._write()

    def retry(self) -> None:
        """Write what could not be written; nothing where all is. Raises `StateFileNotWritten`."""
        if self._unwritten:
            self._write()

    def forget(self, *uids: str) -> None:
        """The pods are gone. Raises `StateFileNotWritten`."""
        known = [uid for uid in uids if self._pods.pop(uid, None) is not None]
        if known:
            self._write()

    def _write(self) -> None:
        body = {"format": FORMAT, "pods": [pod.to_dict() for pod in self._pods.values()]}
        self._unwritten = True
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            files.replace(self._path, json.dumps(body, separators=(",", ":")).encode(), 0o600)
        except OSError as error:
            raise StateFileNotWritten(
                f"{self._path} cannot be written: {error.strerror}; make room on the disk or "
                "correct `state_folder`"
            ) from error
        self._unwritten = False


def _parse(path: Path) -> dict[str, SavedAssignment]:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
    body = json.loads(path.read_bytes())
    if (
        not isinstance(body, dict)
        or body.get("format") != FORMAT
        or not isinstance(body.get("pods"), list)
    ):
        raise ValueError(f"it is no {FORMAT}")
    try:
        pods = [SavedAssignment.from_dict(entry) for entry in body["pods"]]
    except ValidationError as error:
        raise ValueError(f"a pod in it is malformed: {error.errors()[0]['loc']}") from error
    return {pod.uid: pod for pod in pods}
