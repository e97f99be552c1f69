"""Golden tokens for `publish --record-probes`: a vLLM, in whatever environment has one, loads the
version cold and answers a few prompts.

It loads what is published and nothing else: what a folder has besides, other layouts of the weights or
what was ignored, vLLM would choose by its own rules, and the tokens would be another model's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import typer
from pydantic import TypeAdapter, ValidationError

import hotweights as package
import hotweights_transports
from hotweights.adapters.vllm.golden import NEAR_TIE
from hotweights_common.errors import HotweightsError
from hotweights_common.reasons import Reason
from hotweights_planner.manifest import Probe
from hotweights_storage.checkpoint import Checkpoint
from hotweights_storage.errors import Cancelled
from hotweights_storage.source_reads import TICK_SECONDS, SourceReads
from hotweights_storage.weight_files import is_side_file, is_weights

VLLM_PYTHON = "HOTWEIGHTS_VLLM_PYTHON"  # a variable; the default is this very Python
PROBE_SECONDS: Final = 3600.0
"""A cold load of a large model from a slow disk; a vLLM that hangs is not waited for all night."""


@dataclass(frozen=True, slots=True)
class Recorder:
    """Asks a vLLM, by a process of its own, what it answers after a cold load."""

    checkpoint: Path
    dtype: str
    """vLLM's ``--dtype``."""
    seconds: float
    """How long it may take, from its start to its answers."""
    tolerance: float | None = None
    """How far the second best logit must lie behind for a token to be recorded; None: as `golden`
    has it for the dtype.
    """

    def record(
        self, found: Checkpoint, reads: SourceReads, stop: threading.Event
    ) -> tuple[Probe, ...]:
        """What a cold load of the version in the folder answers to a few prompts. Raises
        `HotweightsError` (ProbesFailed), `SourceUnavailable` where the folder hangs, and `Cancelled`
        when ``stop`` is set.
        """
        listed = reads.call(
            str(self.checkpoint), "listing its files", lambda: sorted(self.checkpoint.iterdir())
        )
        with _only(self.checkpoint, listed, found) as folder:
            return self._recorded(folder, stop)

    def _recorded(self, folder: Path, stop: threading.Event) -> tuple[Probe, ...]:
        python = os.environ.get(VLLM_PYTHON, sys.executable)
        command = [python, "-m", "hotweights.adapters.vllm.golden", str(folder)]
        typer.echo("recording probes: a cold load by vLLM", err=True)
        command += ["--dtype", self.dtype]
        if self.tolerance is not None:
            command += ["--tolerance", f"{self.tolerance:g}"]
        try:
            # a group of its own: vLLM has processes too, and all of them end with it
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": _our_path()},
                start_new_session=True,
            )
        except OSError as error:
            text = (
                f"cannot run {python}: {error.strerror}; set ${VLLM_PYTHON} to the Python of an "
                "environment with vLLM"
            )
            raise HotweightsError(text, Reason.PROBES_FAILED) from error
        with process, _ended(process):
            out, log = self._answered(process, stop)
        lines = log.decode(errors="replace").splitlines()
        for line in lines:
            if line.startswith(NEAR_TIE):
                typer.echo(line, err=True)
        if process.returncode:
            # the last line has the exception; before it are pages of vLLM's log
            last = next((line for line in reversed(lines) if line.strip()), "")
            text = f"vLLM recorded no probes: {last or f'exit code {process.returncode}'}"
            raise HotweightsError(
                f"{text}; set ${VLLM_PYTHON} to the Python of an environment with vLLM",
                Reason.PROBES_FAILED,
            )
        try:
            return TypeAdapter(tuple[Probe, ...]).validate_json(out)
        except ValidationError as error:
            text = (
                f"{python} printed something else than probes: {error.errors()[0]['msg']}; are both "
                "of one release?"
            )
            raise HotweightsError(text, Reason.PROBES_FAILED) from error

    def _answered(
        self, process: subprocess.Popen[bytes], stop: threading.Event
    ) -> tuple[bytes, bytes]:
        deadline = time.monotonic() + self.seconds
        while True:
            try:
                return process.communicate(timeout=TICK_SECONDS)
            except subprocess.TimeoutExpired:
                if stop.is_set():
                    raise Cancelled("cancelled while vLLM recorded probes") from None
                if time.monotonic() > deadline:
                    raise HotweightsError(
                        f"vLLM recorded no probes of {self.checkpoint} within {self.seconds:g} s; "
                        "allow more with --probe-timeout, or see why its cold load takes so long",
                        Reason.PROBES_FAILED,
                    ) from None


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Nothing of it is left behind, however this ends."""
    try:
        yield
    finally:
        if process.poll() is None:  # else its number may be another's by now
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def _only(checkpoint: Path, listed: Sequence[Path], found: Checkpoint) -> Iterator[Path]:
    """A folder in which a cold load finds the version and no other weights or indices: the
    checkpoint itself, unless there is something to leave out.
    """
    version = found.headers.keys() | found.side_files.keys()
    left_out = {
        path.name for path in listed if is_weights(path.name) or is_side_file(path.name)
    } - version
    if not left_out:
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="hotweights-probes-") as name:
        for path in listed:
            if path.name not in left_out:
                Path(name, path.name).symlink_to(path.absolute())
        yield Path(name)


def _our_path() -> str:
    """``PYTHONPATH`` with which any Python finds this package."""
    roots = [Path(module.__path__[0]).parent for module in (package, hotweights_transports)]
    return os.pathsep.join(
        [*map(str, dict.fromkeys(roots)), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
