"""The plugin's folders: whole, once, and there again after a reboot for the pods that still name
them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hotweights_agent.local import plugin_folder
from hotweights_agent.local.plugin_folder import KEPT_VERSIONS, PluginNotInstalled


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def build(tmp_path: Path, content: str) -> Path:
    """A plugin as an image has it."""
    built = tmp_path / "built"
    (built / "hotweights").mkdir(parents=True, exist_ok=True)
    (built / "hotweights" / "a.py").write_text(content)
    return built


def start_agent(tmp_path: Path, run: Path, version: str) -> list[str]:
    """What an agent of this version does with the folders, later than the one before by the clock
    of their disk; the earlier versions that it laid out.
    """
    built = build(tmp_path, version)
    kept = tmp_path / "state" / "plugin"
    used = [path.stat().st_mtime_ns for path in kept.iterdir()] if kept.exists() else []
    while (built / "hotweights" / "a.py").stat().st_mtime_ns <= max(used, default=0):
        build(tmp_path, version)  # it ticks every few milliseconds
    again = plugin_folder.keep(built, tmp_path / "state" / "plugin", run, version)
    assert plugin_folder.install(built, run, version) == run / "plugin" / version
    return again


def reboot(run: Path) -> None:
    """What is in /run is gone."""
    shutil.rmtree(run)
    run.mkdir()


def laid_out(run: Path) -> dict[str, str]:
    """What pods find, by version."""
    return {
        path.name: (path / "hotweights" / "a.py").read_text()
        for path in sorted((run / "plugin").iterdir())
    }


def test_earlier_versions_are_there_again_after_a_reboot(tmp_path: Path, run: Path) -> None:
    assert start_agent(tmp_path, run, "0.1.0") == []
    assert start_agent(tmp_path, run, "0.2.0") == []
    reboot(run)
    assert start_agent(tmp_path, run, "0.3.0") == ["0.2.0", "0.1.0"]
    assert laid_out(run) == {"0.1.0": "0.1.0", "0.2.0": "0.2.0", "0.3.0": "0.3.0"}
    assert start_agent(tmp_path, run, "0.3.0") == []


def test_what_was_used_longest_ago_is_forgotten_and_what_runs_is_not_touched(
    tmp_path: Path, run: Path
) -> None:
    for number in range(KEPT_VERSIONS + 2):
        start_agent(tmp_path, run, f"0.{number}.0")
    start_agent(tmp_path, run, "0.2.0")  # rolled back
    assert len(laid_out(run)) == KEPT_VERSIONS + 2
    reboot(run)
    start_agent(tmp_path, run, "1.0.0")
    assert set(laid_out(run)) == {
        "1.0.0",
        "0.2.0",
        *(f"0.{KEPT_VERSIONS + 1 - back}.0" for back in range(3)),
    }


def test_what_a_killed_agent_left_half_done_is_cleared_away(tmp_path: Path, run: Path) -> None:
    left = tmp_path / "state" / "plugin" / ".new-abc" / "new"
    left.mkdir(parents=True)
    start_agent(tmp_path, run, "0.1.0")
    assert [path.name for path in (tmp_path / "state" / "plugin").iterdir()] == ["0.1.0"]
    assert set(laid_out(run)) == {"0.1.0"}


def test_without_a_plugin_in_the_image_what_was_kept_is_laid_out(tmp_path: Path, run: Path) -> None:
    start_agent(tmp_path, run, "0.1.0")
    reboot(run)
    assert plugin_folder.keep(tmp_path / "none", tmp_path / "state" / "plugin", run, "0.2.0") == [
        "0.1.0"
    ]
    assert plugin_folder.keep(tmp_path / "none", tmp_path / "nothing", run, "0.2.0") == []


def test_a_disk_that_takes_nothing_is_named(tmp_path: Path, run: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PluginNotInstalled, match="cannot be kept"):
        plugin_folder.keep(build(tmp_path, "1"), tmp_path / "file" / "plugin", run, "0.1.0")
