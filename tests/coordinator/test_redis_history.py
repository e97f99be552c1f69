"""Whether the checker of histories finds what must not be: one good history, and every way to spoil
it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.coordinator.ha import ledger
from tests.coordinator.ha.history import Said, Told, Written, faults

WORKERS = ["w1", "w2"]
BOTH = frozenset(WORKERS)
LEDGER = [
    Written(1, "begun", "v1"),
    Written(1, "begun", "v1", precommits=frozenset({"w1"})),
    Written(1, "precommitted", "v1", precommits=BOTH),
    Written(1, "committed", "v1", 1, "v1", BOTH),
    Written(2, "begun", "v2", 1, "v1"),
    Written(3, "aborted", "v2", 1, "v1"),
    Written(4, "begun", "v3", 1, "v1"),
    Written(4, "committed", "v3", 4, "v3", BOTH),
]
SAID = [Said(1.0, "w1", 1), Said(1.1, "w2", 1), Said(5.0, "w1", 4), Said(5.1, "w2", 4)]
TOLD = [
    Told(0.0, 0.1, "o", True, 1, "begun", "v1"),
    Told(2.0, 2.1, "o", True, 1, "committed", "v1", 1, "v1"),
    Told(2.2, 2.3, "w1", True, 1, "committed", "v1", 1, "v1"),
    Told(3.0, 3.1, "o", True, 2, "begun", "v2"),
    Told(3.2, 3.3, "o", True, 3, "aborted", "v2"),
    Told(5.2, 5.3, "o", True, 4, "committed", "v3", 4, "v3"),
    Told(5.4, 5.5, "w1", True, 4, "committed", "v3", 4, "v3"),
    Told(5.4, 5.5, "follower", False, 4, "committed", "v3", 4, "v3"),
]


def found(told: list[Told] = TOLD, said: list[Said] = SAID, written: list[Written] = LEDGER) -> str:
    return "\n".join(faults(told, said, written, WORKERS))


def test_a_good_history_has_no_fault() -> None:
    assert found() == ""


def test_several_decisions_may_be_one_write() -> None:
    together = [
        *LEDGER[:3],
        Written(2, "begun", "v2", 1, "v1"),
        Written(4, "begun", "v3", 1, "v1"),
        LEDGER[-1],
    ]
    assert found(written=together) == ""


def test_prepared_by_all_and_given_up_may_be_one_write() -> None:
    """The last precommit waited for its turn together with an abort, or with the look that finds
    the deadline passed.
    """
    begun = Written(1, "begun", "v1", precommits=frozenset({"w1"}))
    told = Told(1.2, 1.3, "w2", True, 1, "precommitted")
    assert found([told], SAID, [begun, Written(2, "aborted", "v1", precommits=BOTH)]) == ""
    assert found([told], SAID, [begun, Written(1, "committed", "v1", 1, "v1", BOTH)]) == ""
    assert "1 is precommitted, which was never written" in found([told], SAID, [begun])
    assert "1 was called precommitted before w2 had" in found(
        [told], SAID[:1], [begun, Written(2, "aborted", "v1")]
    )


def test_a_follower_may_know_of_a_commit_before_its_leader_does() -> None:
    early = Told(1.8, 1.9, "follower", False, 1, "committed", "v1", 1, "v1")
    late = Told(1.95, 1.96, "w1", True, 1, "precommitted", "v1", 0)
    assert found([early, late, *TOLD]) == ""


@pytest.mark.parametrize(
    ("told", "fault"),
    [
        (
            Told(5.6, 5.7, "x", True, 5, "committed", "v4", 5, "v4"),
            "x was told that 5 is committed, which was never",
        ),
        (
            Told(5.6, 5.7, "x", False, 3, "committed", "v2", 3, "v2"),
            "x was told that 3 is committed, which was never",
        ),
        (
            Told(5.6, 5.7, "x", True, 4, "committed", "v2", 4, "v3"),
            "x was told that 4 is v2, which was never written",
        ),
        (
            Told(5.6, 5.7, "x", False, 4, "committed", "v3", 4, "v9"),
            "x was told that 4 v9 is current, which was never",
        ),
        (
            Told(5.6, 5.7, "x", True, 1, "committed", "v1", 1, "v1"),
            "x was told 1 at 5.600, after 4 had been called",
        ),
        (
            Told(5.6, 5.7, "x", True, 2, "begun", "v2"),
            "x was told 2 at 5.600, after 4 had been called",
        ),
        (
            Told(5.6, 5.7, "follower", False, 2, "begun", "v2", 1, "v1"),
            "follower saw current go back from 4 to 1",
        ),
        (
            Told(1.0, 1.05, "x", False, 1, "committed", "v1", 1, "v1"),
            "1 was called committed before w2 had",
        ),
    ],
    ids=[
        "made up",
        "aborted",
        "other version",
        "other current",
        "lost",
        "lost by a begin",
        "backwards",
        "too early",
    ],
)
def test_an_answer_that_must_not_be_is_found(told: Told, fault: str) -> None:
    assert fault in found([*TOLD, told])


def test_a_commit_that_somebody_never_spoke_for_is_found() -> None:
    assert "4 was called committed before w2 had" in found(said=SAID[:-1])


@pytest.mark.parametrize(
    ("place", "written", "fault"),
    [
        (4, Written(2, "begun", "v2", 0, ""), "current went back from 1 to 0"),
        (
            4,
            Written(1, "aborted", "v1", 1, "v1", BOTH),
            "token 1 was committed v1, then aborted v1",
        ),
        (
            4,
            Written(1, "committed", "v9", 1, "v1", BOTH),
            "token 1 was committed v1, then committed v9",
        ),
        (4, Written(2, "aborted", "v1", 1, "v1"), "token 2 aborted 1, which was committed"),
        (
            7,
            Written(4, "committed", "v3", 4, "v3", frozenset({"w1"})),
            "token 4 was committed without ['w2']",
        ),
        (7, Written(4, "begun", "v3", 4, "v3"), "4 became current without its commit"),
        (7, Written(5, "committed", "v3", 5, "v3", BOTH), "token 5 is committed from the start"),
        (7, Written(2, "begun", "v2", 1, "v1"), "token went back from 4 to 2"),
    ],
)
def test_a_store_that_must_not_be_is_found(place: int, written: Written, fault: str) -> None:
    assert fault in found(written=[*LEDGER[:place], written])


def test_the_ledger_is_read_from_redis_own_file(tmp_path: Path) -> None:
    folder = tmp_path / "appendonlydir"
    folder.mkdir()

    def plan(phase: str) -> str:
        return '{"token":2,"phase":"%s","plan":{"version":"v"},"precommits":["w"]}' % phase  # noqa: UP031 - braces

    key = "hotweights/c/state"
    commands = [
        *(["SELECT", "0"], ["MULTI"], ["HSET", key, "attempt", plan("begun"), "current", "null"]),
        *(
            ["HSET", key, "token", "2"],
            ["EXEC"],
            ["HSET", "hotweights/another/state", "attempt", plan("aborted")],
        ),
        *(["MULTI"], ["HSET", key, "attempt", plan("committed")]),
        *(["HSET", key, "current", '{"token":2,"version":"v"}'], ["EXEC"]),
    ]

    def line(command: list[str]) -> bytes:
        return f"*{len(command)}\r\n".encode() + b"".join(
            f"${len(w)}\r\n{w}\r\n".encode() for w in command
        )

    (folder / "appendonly.aof.1.incr.aof").write_bytes(b"".join(map(line, commands[:6])))
    (folder / "appendonly.aof.2.incr.aof").write_bytes(
        b"#TS:1\r\n" + b"".join(map(line, commands[6:]))
    )
    first = Written(2, "begun", "v", precommits=frozenset({"w"}))
    second = replace(first, phase="committed", current=2, current_version="v")
    assert ledger.read(tmp_path, "c") == [first, second]
