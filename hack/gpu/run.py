"""Goes through everything that needs a GPU: `make gpu`.

    python3 hack/gpu/run.py [--bundle DIR] [--python PATH] [--only STEP,…] [--again] [--out DIR]

With ``--bundle`` it first assembles an environment from what `python -m gpu pack DIR` wrote; else
``--python`` names an interpreter that has vLLM and this project's test extra (default: this one).
A step that has passed is not repeated, unless ``--again``: what was cut off goes on where it was.
Each step's output is in OUT/STEP.log, and all of it in OUT/results.json. Ends with 1 if a step
failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "hack"))  # run as a file, on a machine where nothing is installed

from gpu import assemble  # noqa: E402

PACKAGES = (
    *("common", "crds", "kube", "planner", "storage", "transports", "coordinator"),
    *("agent", "operator", "hack", "."),
)
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:benchmark")
MODEL_GB = "8"


class Step(NamedTuple):
    """A command for the interpreter that has vLLM, and its limit in seconds."""

    name: str
    command: tuple[str, ...]
    limit_seconds: float
    beside: tuple[str, ...] = ()
    """What may run at the same time: nothing is timed in this step."""


STEPS = (
    Step("hardware", ("hack/gpu/hardware.py",), 60),
    Step("storage", (*PYTEST, "tests/storage/test_device.py"), 60),
    # an engine takes a minute to start: three pairs at a time, while the bench's models are written
    Step(
        "engine",
        (*PYTEST, "-n", "3", "e2e/gpu"),
        200,
        beside=("bench/commit.py", "--gb", MODEL_GB, "--only-models"),
    ),
    # one way and no second start, for which there is no time here
    Step(
        "commit",
        ("bench/commit.py", "--gb", MODEL_GB, "--rounds", "1", "--ways", "Beside", "--no-restart"),
        155,
    ),
)


def run(step: Step, python: Path, out: Path) -> dict[str, Any]:
    """Its outcome: ``passed``, ``seconds``, ``figures`` where it wrote some."""
    figures = out / f"{step.name}.json"
    figures.unlink(missing_ok=True)
    command = list(step.command)
    if step.command[0].endswith(".py"):
        command += ["--json", str(figures)]
    began = time.monotonic()
    beside = _start(python, list(step.beside), out / f"{step.name}-beside.log")
    try:
        process = _start(python, command, out / f"{step.name}.log")
        code = _wait(process, step.limit_seconds)
        if beside is not None:
            _wait(beside, step.limit_seconds - (time.monotonic() - began))
    finally:
        _end(process)
        _end(beside)
    log = (out / f"{step.name}.log").read_text(errors="replace")
    result: dict[str, Any] = {"passed": code == 0, "seconds": round(time.monotonic() - began, 1)}
    lines = log.strip().splitlines()
    result["last_line"] = (
        lines[-1].strip("= ") if lines else ""
    )  # pytest says there what it left out
    if code is None:
        result["error"] = f"not finished within {step.limit_seconds:g} s"
    elif code:
        result["error"] = "\n".join(lines[-15:])
    if figures.exists():
        result["figures"] = json.loads(figures.read_text())
    return result


def _start(python: Path, command: list[str], log: Path) -> subprocess.Popen[bytes] | None:
    if not command:
        return None
    with log.open("w") as stream:
        return subprocess.Popen(
            [str(python), *command],
            cwd=ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=_environment(python),
            start_new_session=True,
        )


def _wait(process: subprocess.Popen[bytes] | None, seconds: float) -> int | None:
    """Its exit status; None when the time was up."""
    if process is None:
        return 0
    try:
        return process.wait(max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen[bytes] | None) -> None:
    if process is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with what it left running
    process.wait()


def _environment(python: Path) -> dict[str, str]:
    packages = os.pathsep.join(str(ROOT / name) for name in PACKAGES)
    return {**os.environ, "PYTHONPATH": packages, "HOTWEIGHTS_VLLM_PYTHON": str(python)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, help="what `python -m gpu pack` wrote")
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--only", help=f"of {', '.join(step.name for step in STEPS)}")
    parser.add_argument("--again", action="store_true", help="repeat what has passed, too")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-results")
    arguments = parser.parse_args()
    wanted = (arguments.only or "").split(",") if arguments.only else [s.name for s in STEPS]
    if unknown := set(wanted) - {step.name for step in STEPS}:
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {[s.name for s in STEPS]}")
    if shutil.which("nvidia-smi") is None:
        parser.exit(2, "no NVIDIA GPU here: nvidia-smi is not on the PATH\n")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    python = arguments.python
    if arguments.bundle:
        began = time.monotonic()
        python = assemble.assemble(arguments.bundle.resolve(), out / "environment")
        print(f"assembled {python} in {time.monotonic() - began:.0f} s", flush=True)
    record = out / "results.json"
    results: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    for step in STEPS:
        if step.name not in wanted:
            continue
        if results.get(step.name, {}).get("passed") and not arguments.again:
            print(f"{step.name}: passed before", flush=True)
            continue
        results[step.name] = run(step, python, out)
        record.write_text(json.dumps(results, indent=1) + "\n")
        word = "passed" if results[step.name]["passed"] else "FAILED"
        outcome = results[step.name]
        print(
            f"{step.name}: {word} after {outcome['seconds']} s: {outcome['last_line']}", flush=True
        )
        if "error" in results[step.name]:
            print(results[step.name]["error"], flush=True)
    print(f"everything is in {out}")
    return 0 if all(results.get(name, {}).get("passed") for name in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
