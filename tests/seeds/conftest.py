"""The two documents that Hotweights was asked for with, run as written: in a fresh copy of the
tree, with an environment of its own.

`deployment.md` and `vllm_integration.md` are those documents, word for word. A test takes a block
by its heading and runs it with bash, ports and paths as they stand there; nobody gives the commands
other words. Services that a block puts in the background end with the test. The folder holds two
small checkpoints, ``ckpt_a`` and ``ckpt_b``, which the documents presuppose.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
DOCUMENTS = Path(__file__).parent
PATIENCE_SECONDS = 120.0


@dataclass(frozen=True)
class Block:
    document: str
    heading: str
    text: str


def blocks_of(document: str) -> list[Block]:
    """Every code block: fenced ones, and where a document has none, what is indented after an empty
    line.
    """
    lines = (DOCUMENTS / document).read_text().splitlines()
    fenced = any(line.lstrip().startswith("```") for line in lines)
    found: list[Block] = []
    heading, inside, before = "", False, ""
    current: list[str] = []
    for line in [*lines, ""]:
        if fenced:
            if line.lstrip().startswith("```"):
                if inside:
                    found.append(Block(document, heading, _dedented(current)))
                    current = []
                inside = not inside
            elif inside:
                current.append(line)
            elif line.startswith("#"):
                heading = line.lstrip("# ")
        elif line.startswith("   ") and (inside or not before):
            inside = True
            current.append(line)
        else:
            if inside:
                found.append(Block(document, heading, _dedented(current)))
                current, inside = [], False
            if line and not line.startswith((" ", "-")):
                heading = line
        before = line
    return found


def _dedented(lines: list[str]) -> str:
    margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return "\n".join(line[margin:] for line in lines) + "\n"


@pytest.fixture(scope="session")
def every_block() -> list[Block]:
    """All of them, of both documents."""
    return [*blocks_of("deployment.md"), *blocks_of("vllm_integration.md")]


@pytest.fixture(scope="session")
def block(every_block: list[Block]) -> Callable[[str, str], str]:
    """A block's text, by a word of its heading and a word of its own."""

    def find(heading: str, word: str) -> str:
        found = [one.text for one in every_block if heading in one.heading and word in one.text]
        assert len(found) == 1, f"{len(found)} blocks under {heading!r} with {word!r}"
        return found[0]

    return find


@dataclass
class House:
    """A user's shell in a folder: what is started in it ends with it."""

    folder: Path
    environment: dict[str, str]
    _shells: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self, text: str, *, seconds: float = 900.0, **environment: str) -> str:
        """Run a block to its end and return all that it printed; what it leaves in the background
        goes on.
        """
        log = self.folder / f".shell-{time.monotonic_ns()}.log"
        with log.open("w") as output:
            shell = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", text], cwd=self.folder, env=self.environment | environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            )  # fmt: skip
        self._shells.append(shell)
        code = shell.wait(seconds)
        printed = log.read_text()
        assert code == 0, f"exit {code}:\n{text}\n{printed}"
        return printed

    def scrape(self, url: str) -> str:
        """A page, as soon as somebody serves it."""
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    return str(answer.read().decode())
            except (OSError, HTTPException):
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)

    def close(self) -> None:
        for shell in self._shells:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(shell.pid, number)
                if _has_ended(shell.pid, 30.0):
                    break
        self._shells.clear()


def _has_ended(group: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while _lives(group):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _lives(group: int) -> bool:
    """Whether one of its processes runs: of a zombie nothing is left, whoever is to bury it."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, of, *_ = stat.read_text().rpartition(")")[2].split()
            if int(of) == group and state not in "ZX":
                return True
    return False


@pytest.fixture(scope="session")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as it would be committed, in a folder with a space in its name, and an environment
    with the extras.
    """
    folder = tmp_path_factory.mktemp("a user") / "hotweights"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    subprocess.run([sys.executable, "-m", "venv", folder / ".venv"], check=True, timeout=300)
    write_checkpoints(folder)
    return folder


def write_checkpoints(folder: Path) -> None:
    """Two versions: one tensor changed, one gone, one new."""
    random = numpy.random.default_rng(7)
    same = {
        f"layers.{number}.weight": random.standard_normal((512, 1024), numpy.float32)
        for number in range(6)
    }
    for name, extra in (("ckpt_a", "old.bias"), ("ckpt_b", "new.bias")):
        changed = random.standard_normal((1024, 1024), numpy.float32)
        (folder / name).mkdir()
        tensors = same | {"head.weight": changed, extra: random.standard_normal(16, numpy.float32)}
        save_file(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text('{"model_type": "none"}\n')


@pytest.fixture(scope="session")
def installed(copy: Path) -> Path:
    """``pip install -e .[extras]``, as the prerequisites say."""
    house = House(copy, _environment(copy))
    house.run("pip install --quiet -e .[extras]")
    return copy


def _environment(folder: Path) -> dict[str, str]:
    keep = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HOTWEIGHTS_", "PYTHON"))
    }
    return keep | {
        "PATH": f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(folder / ".venv"),
        "HOME": str(folder / "home"),  # the user's cache is as fresh as the rest
    }


def _until_free(port: int) -> None:
    """A process whose main thread is a zombie holds its ports until its other threads are gone."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                if time.monotonic() > until:
                    raise
            else:
                return
        time.sleep(0.05)


@pytest.fixture
def house(installed: Path) -> Iterator[House]:
    """A shell for one test; the ports that the documents name must be free."""
    for port in (5555, 5556, 9097, 9099, 9100):
        _until_free(port)  # else something else than what is tested would answer
    (installed / "home").mkdir(exist_ok=True)
    one = House(installed, _environment(installed))
    yield one
    one.close()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[None]:
    """A Redis where the document expects one: port 6379 of this machine, fresh."""
    program = shutil.which("redis-server")
    assert program, "redis-server is missing: install the Debian package redis-server"
    server = subprocess.Popen(
        [
            program,
            "--port",
            "6379",
            "--bind",
            "127.0.0.1",
            "--dir",
            str(tmp_path),
            "--save",
            "",
            "--appendonly",
            "yes",
        ],
        stdout=subprocess.DEVNULL,
    )
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", 6379), 1):
            break
        assert server.poll() is None, f"it ended with {server.returncode}"  # else another answers
        assert time.monotonic() < until, "it does not answer"
        time.sleep(0.05)
    assert server.poll() is None, "something else answers at its port"
    yield
    server.terminate()
    server.wait(PATIENCE_SECONDS)
