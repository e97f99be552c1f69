"""kubectl as a user calls it: demo and tests say what a user would type, and see what a user would
see.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class CommandFailed(Exception):
    """A command ended with an error; the text is what it printed."""


class TimedOut(Exception):
    """Something did not happen in time; the text says what was seen last."""


def run(
    *command: str | Path,
    stdin: str | None = None,
    timeout_seconds: float = 120,
    env: dict[str, str] | None = None,
) -> str:
    """What the command prints. Raises `CommandFailed`, `TimedOut`."""
    line = [str(part) for part in command]
    try:
        done = subprocess.run(
            line,
            input=stdin,
            env={**os.environ, **(env or {})},
            timeout=timeout_seconds,
            capture_output=True,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TimedOut(f"{' '.join(line)} ran longer than {timeout_seconds:g} s") from error
    if done.returncode != 0:
        raise CommandFailed(
            f"{' '.join(line)} ended with {done.returncode}: {(done.stderr or done.stdout).strip()}"
        )
    return done.stdout


def eventually(
    what: str, probe: Callable[[], Any], timeout_seconds: float = 180, every_seconds: float = 0.5
) -> Any:
    """The first truthy answer of ``probe``; its `CommandFailed` count as "not yet". Raises
    `TimedOut` with the last answer, which is of a moment when the time was up.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        is_last = time.monotonic() >= deadline
        try:
            seen = probe()
        except CommandFailed as error:
            seen = error
        else:
            if seen:
                return seen
        if is_last:
            break
        time.sleep(every_seconds)
    raise TimedOut(f"{what}: not within {timeout_seconds:g} s; last seen: {seen!r}")


@dataclass(frozen=True, slots=True)
class Kubectl:
    """One cluster, as its administrator sees it."""

    binary: Path
    kubeconfig: Path
    namespace: str = "default"

    def __call__(
        self, *arguments: str, stdin: str | None = None, timeout_seconds: float = 60
    ) -> str:
        """Run ``kubectl`` with these arguments."""
        return run(
            self.binary, "--kubeconfig", self.kubeconfig, "--namespace", self.namespace, *arguments,
            stdin=stdin, timeout_seconds=timeout_seconds,
        )  # fmt: skip

    def get(self, *arguments: str) -> dict[str, Any]:
        """``kubectl get … -o json``, parsed."""
        body: dict[str, Any] = json.loads(self("get", *arguments, "--output", "json"))
        return body

    def apply(self, *files: Path) -> str:
        """``kubectl apply -f … -f …``."""
        return self("apply", *[part for file in files for part in ("--filename", str(file))])

    def pods(self, selector: str) -> list[dict[str, Any]]:
        """Pods by label that are not on their way out, by name."""
        items: Sequence[dict[str, Any]] = self.get("pods", "--selector", selector)["items"]
        return sorted(
            (pod for pod in items if "deletionTimestamp" not in pod["metadata"]),
            key=lambda pod: str(pod["metadata"]["name"]),
        )
