"""A file server that does not answer: commands that read a folder end with a word about it, and so
does one whose vLLM never answers.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from hotweights.commands import record_probes
from hotweights_planner.manifest import FILE_NAME
from hotweights_storage.source_reads import _Calls
from hotweights_storage.sources.folder import FileSource
from tests.hotweights.checkpoints import checkpoint, plan
from tests.hotweights.command_line import Run

HangsOn = Callable[[str, int], None]
LONG_SECONDS = 1000.0


@pytest.fixture
def hangs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HangsOn]:
    """From now on reads of a file, of so many bytes at most, hang in the kernel: in the open of a FIFO
    that nobody writes to. They, and no others, have done so for `LONG_SECONDS`: under a limit that
    is soon over, whatever the machine has no time for would hang too.
    """
    fifo, read_into, longest = tmp_path / "fifo", FileSource.read_into, _Calls.longest
    os.mkfifo(fifo)
    away: dict[str, int] = {}
    hung: set[int] = set()

    def mounted(self: FileSource, file: str, offset: int, into: memoryview) -> int:
        if len(into) <= away.get(file, -1):
            hung.add(threading.get_ident())
            os.close(os.open(fifo, os.O_RDONLY))
            hung.discard(threading.get_ident())
        return read_into(self, file, offset, into)

    def with_the_hung(self: _Calls) -> tuple[str, float]:
        with self._lock:
            hanging = [what for thread, (_, what) in self._begun.items() if thread in hung]
        return (hanging[0], LONG_SECONDS) if hanging else longest(self)

    monkeypatch.setattr(FileSource, "read_into", mounted)
    monkeypatch.setattr(_Calls, "longest", with_the_hung)
    yield away.__setitem__
    away.clear()
    deadline = time.monotonic() + 30
    while any(t.name.startswith(("source ", "hotweights-read")) for t in threading.enumerate()):
        os.close(os.open(fifo, os.O_RDWR | os.O_NONBLOCK))  # whoever hangs goes on
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOTWEIGHTS_HOME", str(tmp_path / "home"))
    for name in ("HOTWEIGHTS_COORD", "WORLD_SIZE", "RANK", "HOTWEIGHTS_ROOTS"):
        monkeypatch.delenv(name, raising=False)
    made = checkpoint(tmp_path / "ckpt", "v1", 1.0)
    (tmp_path / "plan.json").write_bytes(plan(tmp_path / "ckpt", made).canonical)
    return tmp_path / "ckpt"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_publish_names_the_file_and_the_remedy(
    run: Run, folder: Path, hangs_on: HangsOn, file: str
) -> None:
    (folder / FILE_NAME).unlink(missing_ok=True)
    hangs_on(file, 1 << 30)
    wanted = ("publish", "--checkpoint", folder, "--version", "v1", "--stall-seconds", 999)
    done = run(*wanted, "--json")
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["reason"] == "SourceStalled"
    told = f"{folder}: reading {file} has not returned for 1000 s; see whether its"
    assert told in error["message"]
    assert "--stall-seconds allows more" in error["message"]
    assert not (folder / FILE_NAME).exists()


def test_verify_does_too(run: Run, folder: Path, hangs_on: HangsOn) -> None:
    hangs_on("model.safetensors", 1 << 30)
    done = run("manifest", "verify", folder, "--stall-seconds", 999)
    assert done.returncode == 1
    assert "reading model.safetensors has not returned for 1000 s" in done.stderr


# of a file's header, which alone is read while the version is put in place, the length has 8 bytes
@pytest.mark.parametrize("most_nbytes", [1 << 30, 8], ids=["staging", "committing"])
@pytest.mark.usefixtures("folder")
def test_replicate_does_too(run: Run, hangs_on: HangsOn, tmp_path: Path, most_nbytes: int) -> None:
    hangs_on("model.safetensors", most_nbytes)
    wanted = ("replicate", "--plan", "plan.json", "--commit", "--metrics-port", 0)
    done = run(*wanted, "--stall-seconds", 999)
    assert done.returncode == 1
    assert "ckpt: reading model.safetensors has not returned for 1000 s" in done.stderr
    assert "--stall-seconds allows more" in done.stderr
    assert not (tmp_path / "home" / "current").exists()


HANGS = """#!/bin/sh
sleep 1000 &
echo $$ $! > {pids}.new
mv {pids}.new {pids}
wait
"""


def test_probes_are_not_waited_for_without_end(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python, pids = tmp_path / "python", tmp_path / "pids"
    python.write_text(HANGS.format(pids=pids))
    python.chmod(0o755)
    monkeypatch.setenv("HOTWEIGHTS_VLLM_PYTHON", str(python))
    begins = iter([False])

    def monotonic() -> float:
        """The time is up as soon as it has begun to hang."""
        late = next(begins, True) and pids.exists()
        return time.monotonic() + LONG_SECONDS * late

    monkeypatch.setattr(record_probes, "time", SimpleNamespace(monotonic=monotonic))
    wanted = ("publish", "--checkpoint", folder, "--version", "v1", "--record-probes")
    done = run(*wanted, "--probe-timeout", 999)
    assert done.returncode == 1
    assert f"vLLM recorded no probes of {folder} within 999 s; allow more with" in done.stderr
    for pid in pids.read_text().split():
        assert _ends(int(pid)), "it and all of its processes are ended"


def _ends(pid: int) -> bool:
    deadline = time.monotonic() + 30
    status = Path(f"/proc/{pid}/stat")
    while time.monotonic() < deadline:
        try:
            if status.read_text().rpartition(")")[2].split()[0] == "Z":  # its parent has gone
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False
