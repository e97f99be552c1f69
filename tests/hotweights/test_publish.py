"""``hotweights publish`` and ``manifest verify`` as a user runs them: real files, exit codes, one
clear line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hotweights.commands import publish
from hotweights.published import read_published
from hotweights_planner.header import TensorEntry
from hotweights_planner.manifest import FILE_NAME, build, parse
from tests.hotweights.command_line import Run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "ckpt_a"
    folder.mkdir()
    header = json.dumps({"w": {"dtype": "F32", "shape": [25], "data_offsets": [0, 100]}}).encode()
    (folder / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(range(100))
    )
    (folder / "config.json").write_text("{}")
    return folder


def test_the_emitted_version_pins_the_manifest(run: Run, folder: Path) -> None:
    done = run(
        "publish",
        "--checkpoint",
        folder,
        "--model",
        "Demo_1",
        "--version",
        "v1",
        "--emit",
        "--namespace",
        "team-a",
    )
    assert done.returncode == 0, done.stderr
    manifest = parse((folder / FILE_NAME).read_bytes())
    assert yaml.safe_load(done.stdout) == {
        "apiVersion": "hotweights.dev/v1alpha1",
        "kind": "WeightVersion",
        "metadata": {"name": "demo-1-v1", "namespace": "team-a"},
        "spec": {
            "model": "Demo_1",
            "version": "v1",
            "source": {"uri": f"file://{folder}"},
            "manifest": {"digest": manifest.digest},
        },
    }
    assert "1 tensor, 1 chunk, 1 side file," in done.stderr


def test_the_model_is_named_after_the_folder(folder: Path) -> None:
    arguments = (
        "publish",
        "--checkpoint",
        "./ckpt_a",
        "--version",
        "v0",
        "--output",
        "m_prev.json",
        "--json",
    )
    command = [sys.executable, "-m", "hotweights.cli", *arguments]
    done = subprocess.run(command, capture_output=True, check=True, cwd=folder.parent)
    summary = json.loads(done.stdout)
    assert (summary["model"], summary["nbytes"], summary["chunks"]) == ("ckpt_a", 100, 1)
    published = read_published(folder.parent / "m_prev.json")
    assert published.manifest.digest == summary["digest"]
    assert published.source == folder.as_uri()
    assert not (folder / FILE_NAME).exists()


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--source-uri", "foo", "file:///absolute/path or pvc://claim/path"),
        ("--source-uri", "s3://bucket/x", "file:///absolute/path or pvc://claim/path"),
        ("--namespace", "Bad NS", "is no namespace"),
    ],
)
def test_what_the_cluster_would_refuse_is_not_emitted(
    run: Run, folder: Path, option: str, value: str, text: str
) -> None:
    done = run("publish", "--checkpoint", folder, "--version", "v1", "--emit", option, value)
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr
    assert not (folder / FILE_NAME).exists()


def test_a_damaged_folder_fails_with_file_tensor_and_chunk(run: Run, folder: Path) -> None:
    assert run("publish", "--checkpoint", folder, "--version", "v1").returncode == 0
    assert run("manifest", "verify", folder).returncode == 0
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    done = run("manifest", "verify", folder)
    assert done.returncode == 1
    assert "model.safetensors: chunk 0 of tensor w" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    machine = run("manifest", "verify", folder, "--json")
    assert machine.returncode == 1
    found = json.loads(machine.stdout)
    assert not found["ok"]
    assert (found["differences"][0]["tensor"], found["differences"][0]["chunk"]) == ("w", 0)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("publish", "--checkpoint", "none", "--version", "v1"), 1, "none does not exist"),
        (
            ("publish", "--checkpoint", "ckpt_a", "--version", "no label"),
            2,
            "'no label' is no label value",
        ),
        (
            ("publish", "--checkpoint", "ckpt_a", "--version", "v1", "--model", "a/b"),
            2,
            "'a/b' is no label value",
        ),
        (
            ("publish", "--checkpoint", "ckpt_a", "--version", "v1", "--output", "x/y.json"),
            2,
            "folder x does not exist",
        ),
        (
            ("publish", "--checkpoint", "ckpt_a", "--version", "v1", "--output", "ckpt_a/m.json"),
            2,
            ".manifest.json",
        ),
        (("publish", "--checkpoint", "ckpt_a"), 2, "Missing option '--version'"),
        (("manifest", "verify", "ckpt_a"), 1, "write it with `hotweights publish`"),
        (
            ("manifest", "verify", "ckpt_a", "--manifest", "ckpt_a/config.json"),
            1,
            "model: Field required",
        ),
    ],
)
def test_one_line_names_the_thing_and_the_remedy(
    run: Run,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    text: str,
) -> None:
    monkeypatch.chdir(folder.parent)
    done = run(*arguments)
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert len(done.stderr.splitlines()) == 1


def test_errors_are_json_for_machines(run: Run, folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 20)
    done = run("publish", "--checkpoint", folder, "--version", "v1", "--json")
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["reason"] == "BadCheckpoint"
    assert "truncated" in error["message"]


FAKE = """#!/bin/sh
test "$1 $2" = "-m hotweights.adapters.vllm.golden" || exit 9
echo noise of vLLM >&2
echo "near tie: prompt 1 has 1 tokens of 2, asked with $6 $7" >&2
echo '[{"engine": "vllm '"$4 $5"'", "promptTokenIds": [1, 2], "tokenIds": [3]}]'
"""


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (FAKE, None),
        (
            "#!/bin/sh\necho 'No module named vllm' >&2; exit 1",
            "No module named vllm; set $HOTWEIGHTS_VLLM_PYTHON",
        ),
        ("#!/bin/sh\necho hello", "something else than probes"),
        (None, "cannot run"),
    ],
    ids=["answers", "fails", "babbles", "is not there"],
)
def test_probes_are_recorded_by_the_python_that_has_vllm(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, reason: str | None
) -> None:
    python = folder.parent / "python"
    if script is not None:
        python.write_text(script)
        python.chmod(0o755)
    arguments = (
        "publish",
        "--checkpoint",
        folder,
        "--version",
        "v1",
        "--record-probes",
        "--probe-dtype",
        "float32",
        "--probe-tolerance",
        "0.25",
    )
    monkeypatch.setenv("HOTWEIGHTS_VLLM_PYTHON", str(python))
    done = run(*arguments)
    if reason is None:
        assert done.returncode == 0, done.stderr
        probes = parse((folder / FILE_NAME).read_bytes()).probes
        assert probes is not None
        assert (probes[0].engine, probes[0].token_ids) == ("vllm --dtype float32", (3,))
        # what was cut is said, and nothing else of what vLLM logs
        assert "near tie: prompt 1 has 1 tokens of 2, asked with --tolerance 0.25" in done.stderr
        assert "noise" not in done.stderr
    else:
        assert done.returncode == 1
        assert reason in done.stderr
        assert not (folder / FILE_NAME).exists()


@pytest.mark.parametrize(
    ("model", "version", "name"),
    [
        ("demo", "v1", "demo-v1"),
        ("Qwen2.5_7B", "V1.0", "qwen2.5-7b-v1.0"),
        ("a.-b", "1", "a.b-1"),
        ("x_.y", "z", "x.y-z"),
    ],
)
def test_the_object_has_a_name_that_kubernetes_takes(model: str, version: str, name: str) -> None:
    assert publish.object_name(model, version) == name


@pytest.mark.parametrize(("experts", "warned"), [(4000, False), (9000, True)])
def test_more_pieces_than_engines_map_are_told(experts: int, warned: bool) -> None:
    """Tensors of two chunks, of which the first is the same everywhere: two pieces each."""
    entries, chunks = [], {}
    for expert in range(experts):
        name = f"experts.{expert}.weight"
        entries.append(TensorEntry(name, "U8", (8192,), 8192, 8192 * (1 + expert)))
        chunks[name] = ["0" * 64, f"{expert + 1:064x}"]
    manifest = build("m", "v1", {"a.safetensors": entries}, chunks, chunk_nbytes=4096)
    found = publish.pieces(manifest)
    assert len(found) == warned
    assert all("17999 pieces" in text and "vm.max_map_count" in text for text in found)


def test_nothing_is_left_behind_where_the_manifest_cannot_be_written(
    run: Run, folder: Path
) -> None:
    (folder / FILE_NAME).mkdir()
    done = run("publish", "--checkpoint", folder, "--version", "v1")
    assert done.returncode == 1
    assert "cannot write the manifest" in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        FILE_NAME,
        "model.safetensors",
    ]
