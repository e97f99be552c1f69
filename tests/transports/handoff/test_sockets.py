"""Addresses of unix sockets, which have room for 107 bytes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from hotweights_transports.handoff import sockets


@pytest.mark.parametrize("name", ["node-a", "n" * 253])
def test_any_path_can_be_bound_and_met(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "agent.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as other:
        with sockets.address(path) as short:
            listener.bind(short)
        listener.listen()
        assert path.is_socket()
        sockets.connect(other, path)
        # what stands for the folder is closed again
        links = (link for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
        assert path.parent not in [link.readlink() for link in links]


def test_a_name_that_has_no_room_by_any_way_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File name too long"), sockets.address(tmp_path / ("n" * 99)):
        pass
