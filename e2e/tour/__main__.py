"""``make tour``: a real vLLM on this host goes from v0 to v1 and back while clients ask it, without
root, Go or Kubernetes.

Coordinator, worker and vLLM are started as a user starts them, by commands that are shown, and what
came of it is held against what was promised. All that was started is ended, whatever happens, unless
``--keep`` leaves it for looking around.

It is started with any Python, before anything is installed: so here and in what it imports there is
nothing but the standard library. It is no command of the wheel, whose users have a vLLM of their
own: what it installs, and the traffic, are the tests'.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from e2e.harness.docs import ROOT
from e2e.harness.story import say
from e2e.tour import processes
from e2e.tour.machine import HOST, Ports, lacks, observe
from e2e.tour.play import Tour
from e2e.tour.processes import Failed, Processes
from localvllm.build import BuildError

FOLDER = ROOT / "build" / "tour"
INTERRUPTED_CODE = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOT_OURS = (
    "PYTHONPATH",  # where this module itself was found
    "HOTWEIGHTS_COORD",  # another coordinator's
    "HOTWEIGHTS_COORD_TOKEN",
    "HOTWEIGHTS_SOCKET",
    "HOTWEIGHTS_TOKEN_FILE",
    "VIRTUAL_ENV",  # uv would install into it
)
"""Variables of whoever calls, which would lead the tour's commands elsewhere."""


def main(arguments: list[str] | None = None) -> int:
    """0 when all that was promised was shown, 1 when something was not, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="make tour",
        description="A real vLLM on this host goes to new weights and back under traffic.",
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave everything running, and say where to ask"
    )
    parser.add_argument("--end", action="store_true", help="end what --keep left running")
    parser.add_argument(
        "--folder",
        type=Path,
        default=FOLDER,
        metavar="DIR",
        help="where checkpoints and logs go (default: %(default)s)",
    )
    parser.add_argument(
        "--first-port",
        type=_port,
        metavar="N",
        help="listen at five ports from this one on (default: those of the documents)",
    )
    parser.add_argument(
        "--check", action="store_true", help="say what this machine lacks, and start nothing"
    )
    asked = parser.parse_args(arguments)
    folder = asked.folder.absolute()
    ports = Ports.starting_at(asked.first_port) if asked.first_port else Ports()
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    try:
        if asked.end:
            return _end(folder)
        problems = _in_the_way(folder, ports)
        if problems or asked.check:
            return _refuse(problems)
        return _tour(folder, ports, asked.keep)
    except KeyboardInterrupt:
        print("tour: interrupted; all that it had started is ended", file=sys.stderr)
        return INTERRUPTED_CODE
    except (Failed, BuildError, OSError, TimeoutError) as error:
        return _refuse([str(error)])


def _in_the_way(folder: Path, ports: Ports) -> list[str]:
    left = processes.recorded(folder)
    if left:
        return [
            f"a tour of {folder} runs already ({', '.join(group.name for group in left)}): end it "
            "with make tour ARGS=--end"
        ]
    if folder.exists() and any(folder.iterdir()) and not (folder / processes.RECORD).exists():
        return [f"{folder} holds something else than a tour: name another folder with --folder"]
    return lacks(observe(ports, folder), ports)


def _tour(folder: Path, ports: Ports, keep: bool) -> int:
    began = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)  # the last tour's
    folder.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
    started = Processes(folder, environment)
    kept = False
    try:
        evidence = Tour(folder, ports, started).play()
        problems = evidence.problems()
        say(f"\n{evidence.told()}")
        say(f"time       {time.monotonic() - began:.0f} s in all\n")
        kept = keep and not problems
    finally:
        if not kept:
            # a second Ctrl-C must not leave anything behind; this takes a bounded time
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            say(f"ending all that was started; logs and checkpoints stay in {folder}")
            started.end()
    say(what_next(folder, ports, kept))
    return _refuse(problems)


def what_next(folder: Path, ports: Ports, kept: bool) -> str:
    """The last lines: where to ask what was left running, or what else there is."""
    if kept:
        body = '{"model": "tiny", "prompt": "hello", "max_tokens": 8}'
        return f"""\
It runs on: vLLM serves v0 at {HOST}:{ports.vllm}; logs and checkpoints are in {folder}.
  curl http://{HOST}:{ports.vllm}/v1/completions -H 'Content-Type: application/json' -d '{body}'
  curl http://{HOST}:{ports.worker_metrics}/metrics
  .venv/bin/hotweights coord-status --endpoint tcp://{HOST}:{ports.coordinator}
End it:
  make tour ARGS=--end"""
    return """\
What next
  make tour ARGS=--keep      it stays running, to look around
  docs/vllm.md#vllm-serve    the same with your own vLLM and checkpoints
  docs/WALKTHROUGHS.md       several ranks and hosts, and coordinators that take over
  make demo                  on a Kubernetes cluster of this machine, by kubectl apply (Debian, root, Go)
  docs/install.md            on your own cluster"""


def _end(folder: Path) -> int:
    left = processes.recorded(folder)
    processes.end(reversed(left))
    say(f"ended: {', '.join(group.name for group in left)}" if left else "nothing was running")
    return 0


def _refuse(problems: list[str]) -> int:
    for problem in problems:
        print(f"tour: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _port(text: str) -> int:
    if not text.isdecimal() or not 1024 <= int(text) <= 65531:
        raise argparse.ArgumentTypeError(f"{text!r} begins no five ports: 1024 to 65531")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
