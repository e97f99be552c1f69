"""Everything that the API server says of a rollout, its pods and their nodes, in order: nothing is
missed between two looks.

Three watches, one of each kind, are read into one tape. Objects of one cluster share the numbers of
their resourceVersions, so what was said first is known across kinds. A tape is for one story of
some minutes; a watch that ends is an error, not silence.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.harness.kubectl import CommandFailed, Kubectl, TimedOut

FIRST_SECONDS = 60.0

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Said:
    """One object as it was."""

    kind: str
    name: str
    body: Body
    gone: bool
    at: float  # monotonic seconds, when it was read here

    @property
    def order(self) -> int:
        """What was written before has a lower one."""
        return int(self.body["metadata"]["resourceVersion"])


class Tape:
    """What was said so far. Made by `record`."""

    def __init__(self, kubectl: Kubectl, paths: Mapping[str, str]) -> None:
        """``paths`` are API paths of lists, by the kind's name on the tape."""
        self._changed = threading.Condition()
        self._said: list[Said] = []
        self._latest: dict[tuple[str, str], Said] = {}
        self._broken = ""
        self._closing = False
        self._processes = {kind: _watch(kubectl, path) for kind, path in paths.items()}
        self._threads = [
            threading.Thread(target=self._read, args=(kind, process), daemon=True)
            for kind, process in self._processes.items()
        ]
        for thread in self._threads:
            thread.start()

    @property
    def said(self) -> Sequence[Said]:
        """All of it in the order of writing."""
        with self._changed:
            return sorted(self._said, key=lambda said: said.order)

    def latest(self, kind: str) -> list[Body]:
        """The objects of a kind as they are now, by name."""
        with self._changed:
            return self._now(kind)

    def until(self, what: str, probe: Callable[[Tape], Any], timeout_seconds: float) -> Any:
        """The first truthy answer of ``probe``, which is asked whenever something is said. Raises
        `TimedOut`, `CommandFailed`.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            while True:
                if self._broken:
                    raise CommandFailed(self._broken)
                if answer := probe(self):
                    return answer
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimedOut(f"{what}: not within {timeout_seconds:g} s")
                self._changed.wait(left)

    def save(self, path: Path) -> None:
        """One line of JSON for everything that was said, with its time."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            {"at": round(said.at, 3), "kind": said.kind, "gone": said.gone, "object": said.body}
            for said in self.said
        ]
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def close(self) -> None:
        """End the watches."""
        self._closing = True
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.wait(60)
        for thread in self._threads:
            thread.join(60)

    def _now(self, kind: str) -> list[Body]:
        found = [said for (k, _), said in self._latest.items() if k == kind and not said.gone]
        return [said.body for said in sorted(found, key=lambda said: said.name)]

    def _read(self, kind: str, process: subprocess.Popen[str]) -> None:
        if process.stdout is None:
            return
        with process.stdout as lines:
            for line in lines:
                self._note(kind, json.loads(line))
        with self._changed:
            if not self._closing:
                self._broken = f"the watch of {kind} ended with {process.wait(60)}"
            self._changed.notify_all()

    def _note(self, kind: str, event: Body) -> None:
        with self._changed:
            if event["type"] == "ERROR":
                self._broken = f"the watch of {kind}: {event['object'].get('message', event)}"
            elif event["type"] != "BOOKMARK":
                body = event["object"]
                said = Said(
                    kind,
                    body["metadata"]["name"],
                    body,
                    event["type"] == "DELETED",
                    time.monotonic(),
                )
                self._said.append(said)
                self._latest[kind, said.name] = said
            self._changed.notify_all()


@contextmanager
def record(kubectl: Kubectl, paths: Mapping[str, str]) -> Iterator[Tape]:
    """A tape that has begun for every kind, and runs while the context lasts. Every kind must have
    an object by then. Raises `CommandFailed` where a watch has ended meanwhile.
    """
    tape = Tape(kubectl, paths)
    try:
        tape.until(
            "an object of every kind",
            lambda t: all(t.latest(kind) for kind in paths),
            FIRST_SECONDS,
        )
        yield tape
        tape.until("all of it was heard", lambda _: True, 0.0)
    finally:
        tape.close()


def _watch(kubectl: Kubectl, path: str) -> subprocess.Popen[str]:
    question = "&" if "?" in path else "?"
    command = [
        str(kubectl.binary),
        "--kubeconfig",
        str(kubectl.kubeconfig),
        "get",
        "--raw",
        f"{path}{question}watch=true",
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
