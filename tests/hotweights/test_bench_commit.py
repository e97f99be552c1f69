"""What `bench/commit.py` makes of what it measured."""

from __future__ import annotations

from bench.commit_figures import Rows, claims, kinds

GB = 10**9
FLOORS = {"device_copy": 0.1 / GB, "pinned_copy": 0.1 / GB, "card": ""}


def measured() -> Rows:
    rows = Rows(FLOORS, GB)
    for seconds in (0.2, 0.9, 0.1):
        rows.add("pause", "Beside", seconds, GB, "device_copy")
    rows.add("copy", "Beside", 0.12, GB, "device_copy")
    rows.add("probe", "Beside", 0.05, GB)
    rows.add("pause", "Beside", 0.055, GB // 100, "device_copy")
    rows.add("prepare", "Host", None, GB, "pinned_copy", "this device has no memory of its own")
    rows.add("pause", "reload_weights", 1.2, GB, "device_copy")
    return rows


def test_rows_have_what_is_promised() -> None:
    first, *_ = measured().rows
    assert list(first) == ["what", "way", "changed", "seconds", "floor_seconds", "ratio", "bytes"]
    assert (first["floor_seconds"], first["ratio"], first["changed"]) == (0.1, 2.0, 1.0)


def test_a_part_of_the_pause_that_copies_nothing_has_no_floor() -> None:
    (probe,) = (row for row in measured().rows if row["what"] == "probe")
    assert (probe["floor_seconds"], probe["ratio"]) == (None, None)


def test_a_way_that_is_none_here_is_a_row_with_the_reason() -> None:
    (host,) = (one for one in kinds(measured().rows) if one.way == "Host")
    assert (host.seconds, host.note) == (None, "this device has no memory of its own")


def test_expectations_are_held_against_medians() -> None:
    found = {(one.claim, one.changed): one.held for one in claims(kinds(measured().rows))}
    assert found == {
        ("pause <= 1.3 x floor + 50 ms", 1.0): False,  # 0.2 s of 0.18
        ("pause >= 5 x faster than reload_weights", 1.0): True,
        ("copy <= 1.3 x floor + 50 ms", 1.0): True,
        ("copy >= 5 x faster than reload_weights", 1.0): True,
        ("pause <= 1.3 x floor + 50 ms", 0.01): False,
        ("pause >= 5 x faster than reload_weights", 0.01): True,
        ("pause of 1 % <= 60 ms", 0.01): True,
    }
