"""Sources whose calls hang: whoever asked goes on, and the process can end. A FIFO that nobody writes
to hangs in the kernel as a hard mount does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hotweights_storage import source_reads
from hotweights_storage.errors import Cancelled, SourceUnavailable
from hotweights_storage.reader import Limits
from hotweights_storage.source_reads import SourceReads
from hotweights_storage.sources.base import Source
from hotweights_storage.sources.folder import FileSource

URI = "file:///models/v1"
LONG_SECONDS = 50.0
"""For what comes about at once, unless the machine keeps us waiting."""


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    yield path
    answer(path)


def answer(path: Path) -> None:
    """The file server is back: whoever hangs in opening goes on, and finds a folder without files; so
    does whoever was kept waiting before that, until all have returned.
    """
    back = os.open(path, os.O_RDWR)
    for thread in threading.enumerate():
        if thread.name in (f"source {URI}", "source /models"):
            thread.join(LONG_SECONDS)
            assert not thread.is_alive()
    os.close(back)


def hanging(path: Path) -> Callable[[], Source]:
    def opened() -> Source:
        os.close(os.open(path, os.O_RDONLY))
        return FileSource(URI, lambda _name, flags: os.open(path.parent, flags))

    return opened


def names(source: Source, _limits: Limits) -> list[str]:
    return sorted(source.files())


def test_a_call_that_hangs_is_named_left_behind_and_counted(fifo: Path) -> None:
    reads = SourceReads(stall_seconds=0.2)
    with pytest.raises(SourceUnavailable, match="opening file:///models/v1 has not") as caught:
        reads.read(URI, hanging(fifo), names)
    assert (caught.value.reason, reads.stuck) == ("SourceStalled", 1)


def test_any_other_call_is_watched_too_and_the_remedy_may_be_told(fifo: Path) -> None:
    assert SourceReads(LONG_SECONDS).call("/models", "looking for it", lambda: 7) == 7
    reads = SourceReads(stall_seconds=0.2, remedy="wait for the tape")
    with pytest.raises(
        SourceUnavailable, match=r"/models: looking .* for \d+ s; wait for the tape"
    ):
        reads.call("/models", "looking for it", lambda: os.close(os.open(fifo, os.O_RDONLY)))
    assert reads.stuck == 1


def test_who_interrupts_it_gives_it_time_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a reading has begun, buffers and processes, does not outlive the command."""
    monkeypatch.setattr(source_reads, "CALL_OFF_SECONDS", LONG_SECONDS)

    def use(_source: Source, limits: Limits) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert limits.stop.wait(LONG_SECONDS)
        (tmp_path / "ended").touch()

    with pytest.raises(KeyboardInterrupt):
        SourceReads().read(URI, lambda: FileSource(URI, _nothing), use)
    assert (tmp_path / "ended").exists()


def test_a_source_that_holds_some_is_refused_at_once_until_one_returns(
    fifo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = SourceReads(stall_seconds=0.2)
    for _ in range(source_reads.MAX_STUCK):
        with pytest.raises(SourceUnavailable, match="opening"):
            reads.read(URI, hanging(fifo), names)
    asked: list[str] = []

    def opened() -> Source:
        asked.append("again")
        return hanging(fifo)()

    with pytest.raises(SourceUnavailable, match="2 readings of it hang"):
        reads.read(URI, opened, names)
    assert not asked
    monkeypatch.setattr(reads, "_stall_seconds", LONG_SECONDS)
    assert reads.read("file:///models/v2", lambda: FileSource(URI, _nothing), _uri) == URI
    answer(fifo)
    assert reads.stuck == 0
    back: list[int] = []
    answering = threading.Timer(0.05, lambda: back.append(os.open(fifo, os.O_RDWR)))
    answering.start()
    assert reads.read(URI, hanging(fifo), names) == []
    answering.join()
    os.close(back[0])


def test_one_that_nobody_wants_any_more_is_left_behind_soon(
    fifo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_reads, "CALL_OFF_SECONDS", 0.1)
    reads, stop = SourceReads(), threading.Event()

    def opened() -> Source:
        stop.set()  # now that the call has begun
        return hanging(fifo)()

    with pytest.raises(Cancelled, match="while a call of it hung"):
        reads.read(URI, opened, names, stop)
    assert reads.stuck == 1


def test_what_is_called_off_makes_no_further_call() -> None:
    stop, calls = threading.Event(), 0

    class Counting(FileSource):
        def files(self) -> dict[str, int]:
            nonlocal calls
            calls += 1
            stop.set()
            return {}

    def use(source: Source, _limits: Limits) -> None:
        for _ in range(2):
            source.files()

    # the second is told before the call, or the first after it where that was seen so soon
    with pytest.raises(
        Cancelled, match=r"cancelled before listing|listing .* returned when nobody"
    ):
        SourceReads().read(URI, lambda: Counting(URI, _nothing), use, stop)
    assert calls == 1
    with pytest.raises(Cancelled):
        SourceReads().read(URI, lambda: Counting(URI, _nothing), use, stop)
    assert calls == 1


def test_a_call_that_returns_too_late_gives_nothing_to_anybody(fifo: Path) -> None:
    used: list[object] = []
    reads = SourceReads(LONG_SECONDS)

    class Slow(FileSource):
        def files(self) -> dict[str, int]:
            reads._stall_seconds = 0.2  # from here on: to open it may take longer
            os.close(os.open(fifo, os.O_RDONLY))
            return {}

    with pytest.raises(SourceUnavailable, match="listing its files"):
        reads.read(URI, lambda: Slow(URI, _nothing), lambda source, _: used.append(source.files()))
    answer(fifo)
    assert (used, reads.stuck) == ([], 0)


def test_what_the_reading_raises_is_raised() -> None:
    def use(_source: Source, _limits: Limits) -> None:
        raise SourceUnavailable("the disk is gone")

    with pytest.raises(SourceUnavailable, match="the disk is gone"):
        SourceReads().read(URI, lambda: FileSource(URI, _nothing), use)


@pytest.mark.timeout(120)
def test_a_process_with_a_hanging_call_ends(fifo: Path) -> None:
    program = (
        "import os, sys; from hotweights_storage.source_reads import SourceReads\n"
        "from hotweights_storage.errors import SourceUnavailable\n"
        "try: SourceReads(0.1).read('file:///v', lambda: os.open(sys.argv[1], os.O_RDONLY), None)\n"
        "except SourceUnavailable as error: print(error.reason)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(fifo)], capture_output=True, text=True, timeout=100
    )
    assert (ended.stdout.strip(), ended.returncode) == ("SourceStalled", 0)


def _nothing(_name: str, _flags: int) -> int:
    raise FileNotFoundError


def _uri(source: Source, _limits: Limits) -> str:
    return source.uri
