"""Golden tokens for `publish --record-probes`: a vLLM, in whatever environment has one, loads the
version cold and answers a few prompts.

It loads what is published and nothing else: what a folder has besides, other layouts of the weights or
what was ignored, vLLM would choose by its own rules, and the tokens would be another model's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from pydantic import TypeAdapter, ValidationError

import hotweights as package
import hotweights_transports
from hotweights_common.errors import HotweightsError
from hotweights_common.reasons import Reason
from hotweights_planner.manifest import Probe
from hotweights_storage.checkpoint import Checkpoint
from hotweights_storage.weight_files import is_side_file, is_weights

VLLM_PYTHON = "HOTWEIGHTS_VLLM_PYTHON"  # a variable; the default is this very Python


def recorded_probes(checkpoint: Path, found: Checkpoint, dtype: str) -> tuple[Probe, ...]:
    """What a cold load of the version in the folder answers to a few prompts; ``dtype`` is vLLM's
    ``--dtype``. Raises `HotweightsError` (ProbesFailed).
    """
    with _only(checkpoint, found) as folder:
        return _recorded(folder, dtype)


@contextmanager
def _only(checkpoint: Path, found: Checkpoint) -> Iterator[Path]:
    """A folder in which a cold load finds the version and no other weights or indices: the
    checkpoint itself, unless there is something to leave out.
    """
    version = found.headers.keys() | found.side_files.keys()
    left_out = {
        path.name
        for path in checkpoint.iterdir()
        if is_weights(path.name) or is_side_file(path.name)
    } - version
    if not left_out:
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="hotweights-probes-") as name:
        for path in checkpoint.iterdir():
            if path.name not in left_out:
                Path(name, path.name).symlink_to(path.absolute())
        yield Path(name)


def _recorded(checkpoint: Path, dtype: str) -> tuple[Probe, ...]:
    python = os.environ.get(VLLM_PYTHON, sys.executable)
    roots = [Path(module.__path__[0]).parent for module in (package, hotweights_transports)]
    path = os.pathsep.join(
        [*map(str, dict.fromkeys(roots)), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    command = [python, "-m", "hotweights.adapters.vllm.golden", str(checkpoint), "--dtype", dtype]
    typer.echo("recording probes: a cold load by vLLM", err=True)
    try:
        done = subprocess.run(
            command, capture_output=True, env=os.environ | {"PYTHONPATH": path}, check=False
        )
    except OSError as error:
        text = (
            f"cannot run {python}: {error.strerror}; set ${VLLM_PYTHON} to the Python of an "
            "environment with vLLM"
        )
        raise HotweightsError(text, Reason.PROBES_FAILED) from error
    if done.returncode:
        # the last line has the exception; before it are pages of vLLM's log
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        text = f"vLLM recorded no probes: {last or f'exit code {done.returncode}'}"
        raise HotweightsError(
            f"{text}; set ${VLLM_PYTHON} to the Python of an environment with vLLM",
            Reason.PROBES_FAILED,
        )
    try:
        return TypeAdapter(tuple[Probe, ...]).validate_json(done.stdout)
    except ValidationError as error:
        text = (
            f"{python} printed something else than probes: {error.errors()[0]['msg']}; are both "
            "of one release?"
        )
        raise HotweightsError(text, Reason.PROBES_FAILED) from error
