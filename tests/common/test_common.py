"""The bottom floor: waits, hosts, moments, sizes, files and locks."""

from __future__ import annotations

import stat
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotweights_common import files, hosts, locks, sizes, timestamps
from hotweights_common.backoff import Backoff


def test_waits_grow_to_the_longest_and_stay_there() -> None:
    doubling = Backoff(0.5, 8.0)
    assert [doubling.seconds(n) for n in range(7)] == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    assert doubling.seconds(10**6) == 8.0
    assert [Backoff(1.0, 60.0, factor=4.0).seconds(n) for n in (1, 2, 3, 4)] == [
        1.0,
        4.0,
        16.0,
        60.0,
    ]


@given(failures=st.integers(0, 10**9), drawn=st.floats(0.0, 1.0, exclude_max=True))
def test_a_spread_wait_is_between_half_and_whole(failures: int, drawn: float) -> None:
    backoff = Backoff(0.25, 30.0)
    whole = backoff.seconds(failures)
    assert whole / 2 <= backoff.spread(failures, lambda: drawn) <= whole <= 30.0


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.255.0.9", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("", False),
        ("localhost.example", False),
        ("fe80::1", False),
    ],
)
def test_what_reaches_this_machine_only(host: str, is_loopback: bool) -> None:
    assert hosts.is_loopback(host) is is_loopback


def test_addresses_with_colons_stand_in_brackets_once() -> None:
    assert [hosts.bracketed(h) for h in ("::1", "[::1]", "10.0.0.1", "node")] == [
        "[::1]",
        "[::1]",
        "10.0.0.1",
        "node",
    ]
    assert [hosts.bare(h) for h in ("[::1]", "::1", "node")] == ["::1", "::1", "node"]
    assert [hosts.anywhere(h) for h in ("fd00::7", "[::1]", "10.0.0.1", "node")] == [
        "::",
        "::",
        "0.0.0.0",
        "0.0.0.0",
    ]
    told = ["tcp://[fd00:0::7]:7600", "ucx://10.0.0.1:1", "mpi://node:1", "tcp://[x]:1", "", "x"]
    assert [hosts.of_endpoint(e) for e in told] == ["fd00::7", "10.0.0.1", "node", "", "", ""]
    assert [hosts.is_wildcard(h) for h in ("*", "0.0.0.0", "[::]", "::1")] == [
        True,
        True,
        True,
        False,
    ]


def test_moments_are_written_in_utc_and_read_with_any_zone() -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    assert timestamps.show(moment) == "2026-01-02T03:04:05Z"
    assert timestamps.show_micros(moment) == "2026-01-02T03:04:05.678901Z"
    assert (
        timestamps.show(moment.astimezone(timezone(timedelta(hours=5)))) == "2026-01-02T03:04:05Z"
    )
    assert timestamps.parse("2026-01-02T08:04:05+05:00") == moment.replace(microsecond=0)
    assert timestamps.parse("2026-01-02T03:04:05") == moment.replace(microsecond=0)
    assert [timestamps.parse(text) for text in (None, "", "yesterday")] == [None, None, None]


@given(st.datetimes(timezones=st.just(UTC), min_value=datetime(1970, 1, 1)))
def test_what_is_written_is_read_again(moment: datetime) -> None:
    assert timestamps.parse(timestamps.show_micros(moment)) == moment


@pytest.mark.parametrize(
    ("nbytes", "binary", "decimal"),
    [
        (0, "0B", "0 B"),
        (999, "999B", "999 B"),
        (1000, "1000B", "1.0 kB"),
        (1024, "1.0KiB", "1.0 kB"),
        (999_960, "976.5KiB", "1.0 MB"),
        (2**30 - 1, "1.0GiB", "1.1 GB"),
        (7 * 10**12, "6.4TiB", "7.0 TB"),
        (3 * 2**60, "3145728.0TiB", "3458764.5 TB"),
    ],
)
def test_sizes_for_people(nbytes: int, binary: str, decimal: str) -> None:
    assert (sizes.binary(nbytes), sizes.decimal(nbytes)) == (binary, decimal)


def test_a_file_is_replaced_whole_with_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    files.replace(path, b"one", 0o600)
    with path.open("rb") as before:
        files.replace(path, b"two", 0o644)
        assert before.read() == b"one", "whoever reads goes on with the old one"
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_a_file_that_cannot_be_replaced_stays_and_leaves_nothing_beside(tmp_path: Path) -> None:
    folder = tmp_path / "state.json"
    folder.mkdir()
    with pytest.raises(IsADirectoryError):
        files.replace(folder, b"one", 0o600)
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    with pytest.raises(FileNotFoundError):
        files.replace(tmp_path / "gone" / "state.json", b"one", 0o600)


def test_a_lock_is_held_by_one_and_waited_for(tmp_path: Path) -> None:
    path, inside = tmp_path / "lock", threading.Event()
    with locks.held(path):
        with pytest.raises(locks.Busy, match=str(path)), locks.held(path):
            inside.set()
        assert not inside.is_set()
    with locks.held(path):
        inside.set()
    assert inside.is_set()


def test_who_waits_gets_the_lock_when_it_is_free(tmp_path: Path) -> None:
    path, got = tmp_path / "lock", threading.Event()

    def wait() -> None:
        with locks.held(path, wait_seconds=30.0):
            got.set()

    with locks.held(path):
        thread = threading.Thread(target=wait)
        thread.start()
        assert not got.wait(0.05)
    assert got.wait(30.0)
    thread.join()
