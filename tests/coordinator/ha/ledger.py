"""Every state that Redis wrote, in its order, read from its append-only file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tests.coordinator.ha.history import Written


def read(folder: Path, cluster: str) -> list[Written]:
    """The states of one cluster. The server must never have rewritten its file."""
    key = f"hotweights/{cluster}/state".encode()
    fields: dict[bytes, bytes] = {}
    states: list[Written] = []
    for group in _groups(_commands(_content(folder))):
        written = [
            command for command in group if command[0].upper() == b"HSET" and command[1] == key
        ]
        for command in written:
            fields |= dict(zip(command[2::2], command[3::2], strict=True))
        if written and b"attempt" in fields:
            state = _state(fields)
            if state is not None and (not states or states[-1] != state):
                states.append(state)
    return states


def _content(folder: Path) -> bytes:
    files = sorted(
        (folder / "appendonlydir").glob("*.incr.aof"),
        key=lambda path: int(path.name.split(".")[-3]),
    )
    return b"".join(path.read_bytes() for path in files)


def _commands(content: bytes) -> Iterator[list[bytes]]:
    at = 0
    while at < len(content):
        end = content.index(b"\r\n", at)
        count, at = content[at:end], end + 2
        if not count.startswith(b"*"):
            continue  # a remark
        words = []
        for _ in range(int(count[1:])):
            end = content.index(b"\r\n", at)
            nbytes, at = int(content[at + 1 : end]), end + 2
            words.append(content[at : at + nbytes])
            at += nbytes + 2
        yield words


def _groups(commands: Iterator[list[bytes]]) -> Iterator[list[list[bytes]]]:
    """What is written at once."""
    group: list[list[bytes]] | None = None
    for command in commands:
        match command[0].upper():
            case b"MULTI":
                group = []
            case b"EXEC":
                yield group or []
                group = None
            case _ if group is None:
                yield [command]
            case _:
                group.append(command)


def _state(fields: dict[bytes, bytes]) -> Written | None:
    attempt, current = json.loads(fields[b"attempt"]), json.loads(fields[b"current"])
    if attempt is None:
        return None
    return Written(
        attempt["token"],
        attempt["phase"],
        attempt["plan"]["version"],
        current["token"] if current else 0,
        current["version"] if current else "",
        frozenset(attempt["precommits"]),
    )
