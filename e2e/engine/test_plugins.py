"""vLLM loads our plugins and those of its image, whatever the image's VLLM_PLUGINS says."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import localvllm
from e2e.engine import inside
from hotweights.adapters.vllm import bundle

SECONDS = 300.0  # importing vLLM takes most of it
OURS = ["hotweights_server"]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What somebody installed: a plugin, a platform, and an endpoint, which vLLM loads by name
    alone.
    """
    folder = tmp_path_factory.mktemp("image")
    information = folder / "image-0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: image\nVersion: 0\n")
    (information / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nimage_plugin = image_plugins:nothing\n"
        "[vllm.platform_plugins]\nimage_platform = image_plugins:nothing\n"
        "[vllm.endpoint_plugins]\nimage_server = image_plugins:Server\n"
    )
    (folder / "image_plugins.py").write_text(
        "def nothing(): ...\nclass Server:\n    name, required_tasks = 'image_server', None\n"
    )
    return folder


@pytest.mark.parametrize(
    ("listed", "unnamed", "endpoints"),
    [
        (None, {"hotweights", "image_plugin", "image_platform"}, OURS),
        ("", {"hotweights"}, OURS),
        ("image_plugin", {"hotweights", "image_plugin"}, OURS),
        ("image_server", {"hotweights"}, ["image_server", *OURS]),
    ],
    ids=["not set", "empty", "a plugin", "an endpoint"],
)
def test_ours_load_beside_the_image_s(
    tmp_path: Path, image: Path, listed: str | None, unnamed: set[str], endpoints: list[str]
) -> None:
    path = [bundle.write(tmp_path / "plugin"), image]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    variables |= {"HOTWEIGHTS_SOCKET": "/nobody/listens", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    variables |= {} if listed is None else {"VLLM_PLUGINS": listed}
    done = subprocess.run(
        [str(localvllm.python()), Path(inside.__path__[0]) / "plugins.py"],
        env=variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    own = {"hotweights", "image_plugin", "image_platform"}  # vLLM has some itself
    assert own & set(found["unnamed"]) == unnamed, done.stderr
    assert sorted(found["endpoints"]) == sorted(found["again"]) == sorted(endpoints), done.stderr
    assert "must be explicitly" not in done.stderr, "vLLM complains about what was loaded"
