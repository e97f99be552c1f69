"""The roads to a GPU: on a machine without one each says why not; with one (marker ``gpu``) every
road gives equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from hotweights_storage.device import CopyPath, choose, to_device
from hotweights_storage.errors import TransferError
from hotweights_storage.image import Image, ImageBuilder
from hotweights_storage.resolve import publish
from hotweights_storage.sources.file import open_folder
from hotweights_storage.stage import stage_from_source

GPU = choose("cuda").name != "host"


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Image]:
    tensors: dict[str, Any] = {
        "a.weight": numpy.arange(9 << 20, dtype=numpy.uint8),
        "b": numpy.ones((3, 5), dtype=numpy.float16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with open_folder(tmp_path) as source, ImageBuilder(publish(source, "m", "v1")) as builder:
        stage_from_source(source, builder)
        image = builder.finish()
    yield image
    image.close()


def test_the_cpu_needs_no_road() -> None:
    assert choose("cpu", pinned=True, direct=True) == CopyPath("host", "the CPU was asked for")


@pytest.mark.skipif(GPU, reason="this machine has a GPU: see the test below")
def test_without_a_gpu_the_version_stays_where_it_is_and_says_why(tmp_path: Path) -> None:
    road = choose("cuda", pinned=True, direct=True, sample=tmp_path / "never read")
    assert road.name == "host"
    assert road.because.startswith("no GPU: ")


def test_there_is_no_way_to_a_gpu_that_is_not_there(image: Image) -> None:
    with pytest.raises(TransferError, match="no road to a GPU: because"):
        to_device(image, CopyPath("host", "because"))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason=choose("cuda").because)
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("pinned", [False, True])
def test_every_road_gives_the_bytes_that_were_published(
    image: Image, tmp_path: Path, pinned: bool, direct: bool
) -> None:
    road = choose("cuda", pinned=pinned, direct=direct, sample=tmp_path / "model.safetensors")
    print(road)
    version = to_device(image, road, tmp_path)
    version.verify()
    version.close()
