"""What a rank looks at before it takes a version: room for it, and what the engine booted from."""

from __future__ import annotations

import fcntl
import inspect
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore

from hotweights.adapters.vllm import plugin, releases
from hotweights.adapters.vllm.rank import room, ways
from hotweights.adapters.vllm.rank.engine import Engine
from hotweights.adapters.vllm.rank.fit.compatibility import boot_folder
from hotweights.adapters.vllm.rank.image import Image
from hotweights.adapters.vllm.rank.room import NoRoom, Room
from hotweights.adapters.vllm.rank.table import PAGE
from hotweights_common import memory

CPU = torch.device("cpu")
GIB = 1 << 30


def test_this_release_is_as_its_adapter_says() -> None:
    assert plugin.unsupported() == ""
    queues = inspect.getsource(Scheduler.__init__)
    assert all(f"self.{name} = " in queues for name in releases.api().scheduler_queues)
    assert hasattr(EngineCore, "set_weight_version") == releases.api().has_weight_version
    assert not releases.api().is_deferred_attention_layer(torch.nn.Linear(1, 1))


def test_an_engine_has_all_that_its_base_demands() -> None:
    assert not Engine.__abstractmethods__
    assert vars(Engine).keys() >= plugin.IMPLEMENTED


@pytest.mark.parametrize(("free", "fits"), [(2 * GIB, True), (GIB, False), (-5, False)])
def test_a_copy_is_refused_before_its_first_byte(
    monkeypatch: pytest.MonkeyPatch, free: int, fits: bool
) -> None:
    monkeypatch.setattr(memory, "available_nbytes", lambda: free)
    if fits:
        room.measure(CPU).check(GIB)
    else:
        with pytest.raises(NoRoom, match=r"needs 1\.35 GiB and .* are free .*: raise the limit"):
            room.measure(CPU).check(GIB)


PLENTY, PART, NOTHING = 20 * GIB, 2 * GIB, 0
NEEDS = ways.Needs(10 * GIB, GIB)


@pytest.mark.parametrize(
    ("device", "host", "seconds", "way"),
    [
        (PLENTY, PLENTY, 0.0, "Beside"),
        (PART, PLENTY, 9.0, "Host"),
        (PART, PART, 9.0, "InPause"),
        (PART, None, 9.0, "InPause"),
        (PART, None, 0.0, None),
        (NOTHING, PLENTY, 9.0, None),
    ],
)
def test_the_way_with_the_shortest_pause_that_there_is_room_for(
    device: int, host: int | None, seconds: float, way: str | None
) -> None:
    there = Room(device, host, "on cuda:0", "give more")
    wish = ways.Wish("Auto", seconds)
    if way is not None:
        assert ways.choose(wish, NEEDS, there, parts=True) == way
    else:
        with pytest.raises(NoRoom, match=r"GiB are free on cuda:0, and a second copy needs .*more"):
            ways.choose(wish, NEEDS, there, parts=True)
    with pytest.raises(NoRoom, match=r"a second copy needs 11\.25 GiB: give more"):
        ways.choose(replace(wish, way="Beside"), NEEDS, replace(there, device_nbytes=PART), True)


@pytest.mark.parametrize(
    ("way", "parts", "host", "why"),
    [
        ("Host", True, None, "no memory but the host's"),
        ("Host", False, PLENTY, "cannot be finished part by part"),
        ("InPause", True, PLENTY, "maxPauseSeconds .* is not set"),
    ],
)
def test_a_way_that_is_none_is_refused_in_a_sentence(
    way: str, parts: bool, host: int | None, why: str
) -> None:
    with pytest.raises(NoRoom, match=rf"{way} is no way here: .*{why}"):
        ways.choose(ways.Wish(way), NEEDS, Room(PLENTY, host, "here", "more"), parts)


def test_mappings_are_counted_against_the_kernel_s_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    used = len(Path("/proc/self/maps").read_text().splitlines())
    limit = tmp_path / "max_map_count"
    monkeypatch.setattr(room, "_MAX_MAP_COUNT", limit)
    limit.write_text(f"{2 * (used + 1000)}\n")
    room.check_mappings(100)
    with pytest.raises(NoRoom, match=r"raise it on the node \(sysctl -w vm\.max_map_count="):
        room.check_mappings(5000)
    limit.unlink()  # a sandbox that does not show it
    room.check_mappings(10**9)


def test_a_version_in_too_many_pieces_is_refused_before_the_first_mapping() -> None:
    pieces = 64
    fd, table_fd = (os.memfd_create(name, os.MFD_ALLOW_SEALING) for name in ("slab", "table"))
    os.ftruncate(fd, 2 * pieces * PAGE)
    extents = [[0, 2 * number * PAGE, PAGE] for number in range(pieces)]
    tensor = {"name": "a", "dtype": "U8", "shape": [pieces * PAGE], "nbytes": pieces * PAGE}
    table = {"digest": "d", "version": "v", "tensors": [{**tensor, "extents": extents}]}
    os.write(table_fd, str(table).replace("'", '"').encode())
    asked: list[int] = []

    def refuse(count: int) -> None:
        asked.append(count)
        raise NoRoom("no")

    for sealed in (fd, table_fd):
        fcntl.fcntl(sealed, 1033, 0xF)
    before = Path("/proc/self/maps").read_text().count("memfd:slab")
    with pytest.raises(NoRoom):
        Image.open([table_fd, fd], "d", refuse)
    assert asked == [pieces]
    assert Path("/proc/self/maps").read_text().count("memfd:slab") == before
    os.close(fd)
    os.close(table_fd)


def test_what_an_engine_booted_from_is_found_by_its_name_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The cache as huggingface_hub lays it out; nothing is fetched."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--org--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("1" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    assert boot_folder(SimpleNamespace(model="org/name", revision=None)) == snapshot
    assert boot_folder(SimpleNamespace(model=str(snapshot), revision=None)) == snapshot
    assert not boot_folder(SimpleNamespace(model="org/other", revision=None)).is_dir()
