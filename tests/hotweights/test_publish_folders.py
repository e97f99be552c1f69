"""What `publish` asks of a folder before it becomes a version, and says about it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hotweights_planner.manifest import FILE_NAME, parse
from tests.hotweights.command_line import Run
from tests.storage import folder_shapes as shapes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and their index, as a save leaves them: whole, and for everybody to read."""
    folder = tmp_path / "ckpt"
    folder.mkdir(mode=0o755)
    shapes.weights(folder / shapes.A, "ab")
    shapes.weights(folder / shapes.B, "c")
    shapes.index(folder / shapes.INDEX, a=shapes.A, b=shapes.A, c=shapes.B)
    for seconds, name in enumerate((shapes.A, shapes.B, shapes.INDEX)):
        os.utime(folder / name, (seconds, seconds))
        (folder / name).chmod(0o644)
    return folder


def test_a_whole_folder_is_published_without_a_word_of_warning(run: Run, folder: Path) -> None:
    done = run("publish", "--checkpoint", folder, "--version", "v1")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr


def test_a_save_without_its_marker_is_not_published(run: Run, folder: Path) -> None:
    wanted = ("publish", "--checkpoint", folder, "--version", "v1", "--require", "_SUCCESS")
    done = run(*wanted)
    assert done.returncode == 1
    assert "_SUCCESS is not in it: the save is not finished, or broke off" in done.stderr
    assert not (folder / FILE_NAME).exists()
    (folder / "_SUCCESS").touch()
    assert run(*wanted).returncode == 0
    os.utime(folder / shapes.A)  # the next save, over this one, has begun
    os.utime(folder / "_SUCCESS", (5, 5))
    done = run(*wanted)
    assert done.returncode == 1
    assert f"_SUCCESS is older than {shapes.A}: it is of an earlier save" in done.stderr
    assert run(*wanted, "--lenient").returncode == 0


def test_shards_around_their_index_in_time_are_told(run: Run, folder: Path) -> None:
    os.utime(folder / shapes.A, (9, 9))
    done = run("publish", "--checkpoint", folder, "--version", "v1")
    assert done.returncode == 0
    assert f"warning: {shapes.A} is newer than the index, {shapes.B} is older" in done.stderr
    machine = run("publish", "--checkpoint", folder, "--version", "v1", "--json")
    assert "newer than the index" in json.loads(machine.stdout)["warnings"][0]
    assert not machine.stderr


def test_files_that_agents_cannot_read_are_told_with_the_remedy(run: Run, folder: Path) -> None:
    """As safetensors 0.8 writes them, and the agents are root without capabilities."""
    if os.geteuid() == 0:
        os.chown(folder / shapes.B, 1000, 1000)
    (folder / shapes.B).chmod(0o600)
    done = run("publish", "--checkpoint", folder, "--version", "v1")
    assert done.returncode == 0
    owner = (folder / shapes.B).stat().st_uid
    assert f"warning: {shapes.B} has mode 0600 and belongs to user {owner}" in done.stderr
    assert "agents, which are root without capabilities, cannot read it" in done.stderr
    assert "chmod -R a+rX" in done.stderr
    (folder / shapes.B).chmod(0o644)
    assert "warning" not in run("publish", "--checkpoint", folder, "--version", "v1").stderr


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (np.array([[1, np.nan], [-np.inf, 2]], np.float32), "1 NaN and 1 infinite values"),
        (np.zeros((4, 4), np.float32), "tensor w is zero everywhere"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(
    run: Run, tmp_path: Path, values: np.ndarray, text: str
) -> None:
    (tmp_path / "m").mkdir()
    save_file({"w": values}, tmp_path / "m" / "model.safetensors")
    done = run("publish", "--checkpoint", tmp_path / "m", "--version", "v1")
    assert done.returncode == 1
    assert text in done.stderr
    assert "--lenient publishes it all the same" in done.stderr
    assert not (tmp_path / "m" / FILE_NAME).exists()
    done = run("publish", "--checkpoint", tmp_path / "m", "--version", "v1", "--lenient")
    assert done.returncode == 0
    assert "warning: tensor w" in done.stderr


def test_what_is_ignored_is_no_part_of_the_version(run: Run, folder: Path) -> None:
    shapes.weights(folder / "mtp.safetensors", "m")
    (folder / "eval.json").write_text("{}")
    ignored = ("--ignore", "mtp*", "--ignore", "eval.json")
    done = run("publish", "--checkpoint", folder, "--version", "v1", *ignored)
    assert done.returncode == 0
    assert "warning" not in done.stderr
    manifest = parse((folder / FILE_NAME).read_bytes())
    assert [file.name for file in manifest.files] == [shapes.INDEX]
    assert run("manifest", "verify", folder).returncode == 0


SEES = """#!/bin/sh
files=$(ls "$3" | tr '\\n' ' ')
echo "[{\\"engine\\": \\"$files\\", \\"promptTokenIds\\": [1], \\"tokenIds\\": [3]}]"
"""


def test_probes_are_of_the_version_and_not_of_what_lies_beside_it(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = folder.parent / "python"
    python.write_text(SEES)
    python.chmod(0o755)
    monkeypatch.setenv("HOTWEIGHTS_VLLM_PYTHON", str(python))
    (folder / "modeling_own.py").touch()
    (folder / "eval.json").write_text("{}")
    shapes.weights(folder / "consolidated.safetensors", "xyz")
    wanted = ("publish", "--checkpoint", folder, "--version", "v1", "--record-probes")
    assert run(*wanted, "--ignore", "eval.json").returncode == 0
    probes = parse((folder / FILE_NAME).read_bytes()).probes
    assert probes is not None
    assert probes[0].engine.split() == [shapes.A, shapes.B, shapes.INDEX, "modeling_own.py"]


def test_weights_beside_a_version_are_told_when_it_is_verified(run: Run, folder: Path) -> None:
    (folder / shapes.INDEX).unlink()
    assert run("publish", "--checkpoint", folder, "--version", "v1").returncode == 0
    assert run("manifest", "verify", folder).stderr == ""
    shapes.weights(folder / "late.safetensors", "l")
    done = run("manifest", "verify", folder)
    assert done.returncode == 0
    assert "warning: late.safetensors in the folder: no part of the version" in done.stderr
    machine = json.loads(run("manifest", "verify", folder, "--json").stdout)
    assert machine["beside"] == ["late.safetensors"]


def test_options_that_agents_do_not_know_need_the_manifest_in_the_folder(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    elsewhere = ("--output", tmp_path / "m.json")
    wanted = ("publish", "--checkpoint", folder, "--version", "v1", *elsewhere, "--emit")
    assert run(*wanted).returncode == 0
    done = run(*wanted, "--ignore", "*.txt")
    assert done.returncode == 2
    assert "the manifest has to lie in the folder" in " ".join(done.stderr.replace("│", "").split())


def test_patterns_that_leave_no_weights_are_named(run: Run, folder: Path) -> None:
    done = run("publish", "--checkpoint", folder, "--version", "v1", "--ignore", "*.safetensors")
    assert done.returncode == 1
    assert "--ignore leaves no .safetensors file of it" in done.stderr
