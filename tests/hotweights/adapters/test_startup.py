"""vLLM loads the plugin whatever VLLM_PLUGINS says, and what others have Python run at its start
runs too. That vLLM itself obeys: `e2e/engine/test_plugins.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from hotweights.adapters.inprocess import binder
from hotweights.adapters.vllm import bundle
from hotweights.adapters.vllm.startup import allow_list

SHOW = "import json, os; print(json.dumps(dict(os.environ)))"


def environment(*path: Path, **variables: str) -> dict[str, str]:
    """What a Python with this path sees, and its children."""
    run = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    done = subprocess.run(
        [sys.executable, "-c", run, SHOW],
        env={"PYTHONPATH": ":".join(map(str, path)), **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found: dict[str, str] = json.loads(done.stdout)
    return {**found, "stderr": done.stderr}


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    return bundle.write(tmp_path / "plugin")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "hotweights,hotweights_server"),
        ("mine", "mine,hotweights,hotweights_server"),
        ("hotweights_server, mine", "hotweights_server, mine,hotweights"),
        ("hotweights,hotweights_server", "hotweights,hotweights_server"),
    ],
)
def test_an_allow_list_gets_our_names(before: str, after: str) -> None:
    assert allow_list(before) == after


def test_what_the_image_allows_stays_allowed(plugin: Path) -> None:
    seen = environment(plugin, VLLM_PLUGINS="mine", HOTWEIGHTS_SOCKET="/s")
    assert seen["VLLM_PLUGINS"] == "mine,hotweights,hotweights_server"
    assert not seen["stderr"]


@pytest.mark.parametrize(
    "variables",
    [{"HOTWEIGHTS_SOCKET": "/s"}, {"VLLM_PLUGINS": "mine"}, {"VLLM_PLUGINS": ""}],
    ids=["no list", "no agent", "nothing allowed, and no agent"],
)
def test_a_list_is_neither_made_nor_changed_in_vain(
    plugin: Path, variables: dict[str, str]
) -> None:
    assert environment(plugin, **variables).get("VLLM_PLUGINS") == variables.get("VLLM_PLUGINS")


def test_what_others_run_at_the_start_runs_too(plugin: Path, tmp_path: Path) -> None:
    """Tracers of applications are injected so, and some images have one of their own."""
    others = [tmp_path / "tracer", tmp_path / "image"]
    for other in others:
        other.mkdir()
        (other / "sitecustomize.py").write_text(
            f"import os\nos.environ['RAN'] = os.environ.get('RAN', '') + '{other.name} '"
            "\nassert __name__ == 'sitecustomize'\n"
        )
    seen = environment(plugin, *others, VLLM_PLUGINS="mine", HOTWEIGHTS_SOCKET="/s")
    assert seen["RAN"] == "tracer tracer ", "in the process and in its child, the first alone"
    assert seen["VLLM_PLUGINS"] == "mine,hotweights,hotweights_server"


def test_two_of_ours_do_not_call_each_other_without_end(plugin: Path, tmp_path: Path) -> None:
    """Of two releases of the chart."""
    (tmp_path / "sitecustomize.py").write_text("import os\nos.environ['RAN'] = 'yes'\n")
    other = bundle.write(tmp_path / "older")
    seen = environment(plugin, other, tmp_path, VLLM_PLUGINS="mine", HOTWEIGHTS_SOCKET="/s")
    assert (seen["VLLM_PLUGINS"], seen["RAN"]) == ("mine,hotweights,hotweights_server", "yes")
    assert not seen["stderr"]


def test_what_fails_in_another_one_ends_nothing(plugin: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("raise ValueError('not mine')\n")
    seen = environment(plugin, tmp_path, VLLM_PLUGINS="mine", HOTWEIGHTS_SOCKET="/s")
    assert seen["VLLM_PLUGINS"] == "mine,hotweights,hotweights_server"
    assert "ValueError: not mine" in seen["stderr"]


@pytest.mark.parametrize(
    ("listed", "found", "served"),
    [
        ("mine,hotweights_server", False, True),
        ("mine", True, False),
        ("", True, False),
        (None, True, True),
        (None, False, False),
    ],
    ids=["named", "another is named", "none is allowed", "all that is found", "not to be found"],
)
def test_a_process_that_the_server_plugin_serves_is_not_bound(
    monkeypatch: pytest.MonkeyPatch, listed: str | None, found: bool, served: bool
) -> None:
    point = EntryPoint("hotweights_server", "x:y", "vllm.endpoint_plugins")
    monkeypatch.setattr(binder, "entry_points", lambda **_: [point] if found else [])
    monkeypatch.setenv("HOTWEIGHTS_SOCKET", "/s")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if listed is not None:
        monkeypatch.setenv("VLLM_PLUGINS", listed)
    assert bool(binder.already_served()) == served
    monkeypatch.delenv("HOTWEIGHTS_SOCKET")
    assert not binder.already_served()
