"""The folder on PYTHONPATH: complete or absent, found by vLLM's way of looking, and free of foreign
imports.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

from hotweights.adapters.vllm import PLUGIN_VERSION, bundle

STANDARD = set(sys.stdlib_module_names)
ALLOWED = {"torch", "vllm", "safetensors", "psutil", "blake3", "huggingface_hub"}
ALLOWED |= {"hotweights", "hotweights_transports", "hotweights_common"}


def test_it_is_found_by_its_entry_points(tmp_path: Path) -> None:
    (found,) = distributions(path=[str(bundle.write(tmp_path / "plugin"))])
    assert (found.name, found.version) == ("hotweights-vllm", PLUGIN_VERSION)
    assert {(point.group, point.name) for point in found.entry_points} == {
        ("vllm.general_plugins", "hotweights"),
        ("vllm.endpoint_plugins", "hotweights_server"),
    }


def test_it_stands_alone(tmp_path: Path) -> None:
    code = (
        "import hotweights.adapters.vllm.agent_connection as m; import "
        "hotweights_transports.handoff.frames as w; print(m.__file__, w.__file__)"
    )
    # without the project's own installation, and without this folder
    command = [sys.executable, "-SP", "-c", code]
    output = subprocess.run(
        command,
        env={"PYTHONPATH": str(bundle.write(tmp_path / "plugin"))},
        check=True,
        capture_output=True,
        text=True,
    )
    assert output.stdout.count(str(tmp_path)) == 2


def test_writing_again_changes_nothing(tmp_path: Path) -> None:
    before = bundle.write(tmp_path / "plugin").stat().st_ino
    assert bundle.write(tmp_path / "plugin").stat().st_ino == before
    assert [path.name for path in tmp_path.iterdir()] == ["plugin"]


def test_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    plugin = bundle.write(tmp_path / "plugin")
    (plugin / "hotweights/adapters/vllm/rank/engine.py").unlink()
    bundle.write(plugin)
    assert (plugin / "hotweights/adapters/vllm/rank/engine.py").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["plugin"]


def test_any_user_may_read_it(tmp_path: Path) -> None:
    plugin = bundle.write(tmp_path / "plugin")
    found = [plugin, *plugin.rglob("*")]
    assert len(found) > 10
    for path in found:
        assert path.stat().st_mode & 0o007 == (0o005 if path.is_dir() else 0o004), path


def test_what_runs_inside_vllm_imports_nothing_else() -> None:
    for name, text in bundle.contents().items():
        if name.endswith(".py"):
            for node in ast.walk(ast.parse(text)):
                modules = (
                    [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                )
                modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert {module.split(".")[0] for module in modules} <= STANDARD | ALLOWED, name
