"""What Argo CD shows of our objects and what it can do with them, case by case in the layout of its
own repository: ``health_test.yaml`` and ``action_test.yaml`` over the objects in ``testdata``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from hotweights_crds.conditions import Condition, is_true
from hotweights_crds.weightrollout import Phase
from tests.argocd import scenes
from tests.argocd.argo_lua import run
from tests.argocd.scenes import COMMAND, CUSTOMIZATIONS, HANDWRITTEN, Body


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def cases(file: str, section: str) -> list[Any]:
    """(folder, case) of a section of every such file."""
    found = [
        pytest.param(path.parent, case, id=f"{path.relative_to(CUSTOMIZATIONS)}:{_name(case)}")
        for path in sorted(CUSTOMIZATIONS.glob(f"*/{file}"))
        for case in load(path)[section]
    ]
    if not found:
        raise LookupError(f"no {file} has {section}")
    return found


def _name(case: Body) -> str:
    return "-".join([case.get("action", ""), Path(case["inputPath"]).stem]).lstrip("-")


@pytest.mark.parametrize(("folder", "case"), cases("health_test.yaml", "tests"))
def test_health(folder: Path, case: Body) -> None:
    health = run((folder / "health.lua").read_text(), load(folder / case["inputPath"]))
    assert health == case["healthStatus"]


@pytest.mark.parametrize(("folder", "case"), cases("actions/action_test.yaml", "discoveryTests"))
def test_what_can_be_done(folder: Path, case: Body) -> None:
    found = run((folder / "discovery.lua").read_text(), load(folder / case["inputPath"]))
    assert found == {result.pop("name"): result for result in case["result"]}
    assert set(found) == {path.parent.name for path in folder.glob("*/action.lua")}


@pytest.mark.parametrize(("folder", "case"), cases("actions/action_test.yaml", "actionTests"))
def test_an_action_changes_one_annotation(folder: Path, case: Body) -> None:
    body = load(folder / case["inputPath"])
    script = (folder / case["action"] / "action.lua").read_text()
    changed = run(script, copy.deepcopy(body), case.get("parameters"))
    assert changed == load(folder / case["expectedOutputPath"])
    command = changed["metadata"]["annotations"].pop(COMMAND)
    body["metadata"].setdefault("annotations", {}).pop(COMMAND, None)
    assert changed["metadata"].setdefault("annotations", {}) == body["metadata"]["annotations"]
    assert changed == body
    verb, revision, identity = command.split(" ")
    assert verb.partition("@")[0] == case["action"]
    assert int(revision) == body["status"]["revision"]
    assert identity == body["metadata"]["resourceVersion"]


def test_every_action_has_a_case() -> None:
    for folder in CUSTOMIZATIONS.glob("*/actions"):
        tried = {case["action"] for case in load(folder / "action_test.yaml")["actionTests"]}
        assert tried == {path.parent.name for path in folder.glob("*/action.lua")}


def test_every_object_has_a_health() -> None:
    for folder in CUSTOMIZATIONS.glob("*"):
        tried = {case["inputPath"] for case in load(folder / "health_test.yaml")["tests"]}
        there = {f"testdata/{path.name}" for path in folder.glob("testdata/*.yaml")}
        assert tried == there


def test_the_objects_are_what_the_operator_decides() -> None:
    """``python -m tests.argocd.scenes`` writes them."""
    for path, text in scenes.files().items():
        assert path.read_text() == text, path.name
    there = set(CUSTOMIZATIONS.rglob("testdata/*.yaml")) - scenes.files().keys()
    assert {(path.parents[1].name, path.stem) for path in there} == {
        (kind, name) for kind, names in HANDWRITTEN.items() for name in names
    }


def test_every_phase_is_among_them() -> None:
    assert {body["status"].get("phase", "Pending") for body in scenes.rollouts().values()} == set(
        get_args(Phase)
    )


def test_healthy_is_ready_and_degraded_is_stalled() -> None:
    """As kstatus reads the same conditions, so that Flux, Helm and Argo CD agree."""
    for kind, bodies in (
        ("WeightRollout", scenes.rollouts()),
        ("WeightVersion", scenes.weight_versions()),
    ):
        script = (CUSTOMIZATIONS / kind / "health.lua").read_text()
        for name, body in bodies.items():
            health = run(script, body)["status"]
            conditions = [Condition.from_dict(c) for c in body["status"].get("conditions", [])]
            seen = body["status"]["observedGeneration"] == body["metadata"]["generation"]
            seen &= "deletionTimestamp" not in body["metadata"]
            assert (health == "Healthy") == (seen and is_true(conditions, "Ready")), name
            assert (health == "Degraded") == (seen and is_true(conditions, "Stalled")), name


def test_the_config_map_says_the_same() -> None:
    data = load(CUSTOMIZATIONS.parents[1] / "argocd-cm.yaml")["data"]
    for folder in CUSTOMIZATIONS.glob("*"):
        key = f"hotweights.dev_{folder.name}"
        health = data.pop(f"resource.customizations.health.{key}")
        assert health == (folder / "health.lua").read_text()
        scripts = sorted(folder.glob("actions/*/action.lua"))
        if scripts:
            actions = yaml.safe_load(data.pop(f"resource.customizations.actions.{key}"))
            assert actions["discovery.lua"] == (folder / "actions" / "discovery.lua").read_text()
            assert actions["definitions"] == [
                {"name": path.parent.name, "action.lua": path.read_text()} for path in scripts
            ]
    assert not data
