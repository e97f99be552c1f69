"""Both environments that the tour runs in, installed side by side: the project's `.venv` and vLLM's
own. The one waits for many small packages, the other for three gigabytes, so together they take
hardly longer than vLLM alone.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

from e2e.harness.docs import ROOT
from e2e.tour.processes import Failed, Processes
from localvllm import build

SECONDS = 3600.0
"""A slow network. Ctrl-C ends it earlier."""
VLLM, HOTWEIGHTS = "install-vllm", "install-hotweights"
NO_INDEX = re.compile(
    r"dns error|name resolution|no route to host|network is unreachable|connection refused|"
    r"error sending request|timed out|failed to lookup|newconnectionerror|no matching distribution",
    re.IGNORECASE,
)
"""How uv and pip say that they reach no package index."""


def missing() -> dict[str, str]:
    """The commands that install what is not there, for a shell in any folder."""
    root, python, hack = (
        shlex.quote(path) for path in (str(ROOT), sys.executable, str(ROOT / "hack"))
    )
    found = {}
    if not _has_hotweights():
        found[HOTWEIGHTS] = f"make --no-print-directory -C {root} PYTHON={python} .venv/.ready"
    if not has_vllm():
        found[VLLM] = f"PYTHONPATH={hack} {python} -m localvllm ensure --uncompiled"
    return found


def _has_hotweights() -> bool:
    """As make sees it."""
    ready = ROOT / ".venv" / ".ready"
    return ready.exists() and ready.stat().st_mtime >= (ROOT / "pyproject.toml").stat().st_mtime


def has_vllm() -> bool:
    """Whether an environment with vLLM was named, or is installed."""
    return bool(os.environ.get(build.PYTHON_VARIABLE)) or build.location().is_dir()


def vllm_python() -> Path:
    """The Python that has vLLM, once it is installed."""
    named = os.environ.get(build.PYTHON_VARIABLE)
    return Path(named).absolute() if named else build.location() / "bin" / "python"


def install(processes: Processes, commands: dict[str, str]) -> None:
    """Run them. Raises `Failed`, with one sentence."""
    for name, command in commands.items():
        processes.start(name, command)
    for name in commands:
        try:
            processes.wait(name, SECONDS)
        except Failed as error:
            raise Failed(explained(str(error), _text(processes.log(name)))) from error


def explained(error: str, log: str) -> str:
    """The error, and what to do where the log shows that no package index was reached."""
    if not NO_INDEX.search(log):
        return error
    return (
        "packages could not be fetched: see whether this machine has a network, and name a proxy "
        f"(HTTPS_PROXY) or an index (PIP_INDEX_URL and UV_DEFAULT_INDEX) where it needs one; {error}"
    )


def progress(processes: Processes) -> str:
    """How far the larger of both is."""
    return progress_of(_text(processes.log(VLLM)))


def progress_of(log: str) -> str:
    """How far vLLM is, by what uv and `localvllm` have said so far."""
    if not log:
        return "the packages of .venv"
    begun, done = (
        len(re.findall(rf"^ *{word} ", log, re.MULTILINE)) for word in ("Downloading", "Downloaded")
    )
    if "checking that it imports" in log:
        return "importing vLLM once"
    if done < begun:
        return f"{done} of {begun} large packages fetched"
    return "unpacking" if begun else "asking the package index"


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
