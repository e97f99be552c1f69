"""A version every hour: what may go, and what must not."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from hotweights.commands.prune_versions import BadInput, unused
from tests.hotweights.command_line import Run

Body = dict[str, Any]


def version(number: int, model: str = "m", namespace: str = "ns", **more: Any) -> Body:
    return {
        "kind": "WeightVersion",
        "metadata": {
            "name": f"{model}-v{number:03}",
            "namespace": namespace,
            "creationTimestamp": f"2026-01-{1 + number // 24:02}T{number % 24:02}:00:00Z",
            **more,
        },
        "spec": {"model": model},
        "status": {"digest": f"sha256:{namespace}-{model}-{number}"},
    }


def rollout(names: str, namespace: str = "ns", **status: Any) -> Body:
    return {
        "kind": "WeightRollout",
        "metadata": {"name": "r", "namespace": namespace},
        "spec": {"versionRef": {"name": names}},
        "status": status,
    }


def complete(name: str, namespace: str = "ns", **status: Any) -> Body:
    return rollout(name, namespace, target={"name": name}, stable={"name": name}, **status)


def names(objects: list[Body], keep: int) -> list[str]:
    return [name for _, name in unused(objects, keep)]


def test_of_a_month_of_hours_the_newest_and_what_is_used_stay() -> None:
    used = complete(
        "m-v719",
        previous={"name": "", "digest": "sha256:ns-m-8"},
        held=[{"name": "m-v009", "digest": "sha256:ns-m-9"}],
    )
    month = [version(number) for number in range(720)]
    gone = names([*month, used], keep=10)
    assert len(gone) == 720 - 3 - 10
    assert not {"m-v719", "m-v008", "m-v009"} & set(gone)
    assert gone == sorted(gone)
    assert gone[-1] == "m-v708"
    assert names([*month, used], keep=720) == []


def test_each_model_and_each_namespace_has_its_own() -> None:
    several = [
        version(number, model, namespace)
        for number in range(3)
        for model in ("a", "b")
        for namespace in ("x", "y")
    ]
    used = [complete("a-v000", "x"), complete("b-v002", "y")]
    assert unused([*several, *used], keep=1) == [
        ("x", "b-v000"),
        ("y", "a-v000"),
        ("y", "b-v000"),
        ("x", "a-v001"),
        ("x", "b-v001"),
        ("y", "a-v001"),
    ]


def test_what_a_rollout_passed_by_may_be_served_until_it_is_complete() -> None:
    """v3 is stable, v5 was begun, v7 is wanted: a pod may be on v5 still."""
    several = [version(number) for number in range(9)]
    passing: Body = {"target": {"name": "m-v007"}, "stable": {"name": "m-v003"}}
    assert names([*several, rollout("m-v007", **passing)], keep=0) == [
        "m-v000",
        "m-v001",
        "m-v002",
    ]
    # before the operator has seen what is wanted
    assert "m-v005" not in names([*several, rollout("m-v008", **complete("m-v003")["status"])], 0)
    assert names([*several, rollout("m-v007")], keep=0) == []


def test_what_goes_already_counts_no_more() -> None:
    several = [version(0, deletionTimestamp="2026-02-01T00:00:00Z"), version(1), version(2)]
    assert names([*several, rollout("other")], keep=1) == ["m-v001"]


def test_without_rollouts_nothing_is_said() -> None:
    with pytest.raises(BadInput, match="get both kinds"):
        unused([version(0)], keep=0)
    assert unused([], keep=0) == []


def test_it_stands_between_get_and_delete(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = [version(0), version(1), complete("m-v001")]
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"items": objects})))
    done = run("prune-versions", "--keep", "0")
    assert done.returncode == 0, done.stderr
    (item,) = json.loads(done.stdout)["items"]
    assert item["metadata"] == {"name": "m-v000", "namespace": "ns"}
    assert "1 WeightVersion may go" in done.stderr


def test_at_a_terminal_it_waits_for_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = io.StringIO()
    monkeypatch.setattr(typed, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", typed)
    done = run("prune-versions", "--json")
    assert done.returncode == 1
    assert (
        "kubectl get weightversions,weightrollouts" in json.loads(done.stdout)["error"]["message"]
    )


def test_a_rollout_of_another_shape_is_refused() -> None:
    with pytest.raises(BadInput, match="WeightRollout r has another shape"):
        unused([version(0), rollout("m-v000", target="m-v000")], keep=0)


@pytest.mark.parametrize("text", ["", "[]", '{"items": [{}]}', '{"items": 7}', "NAME  AGE"])
def test_what_kubectl_does_not_print_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    done = run("prune-versions")
    assert done.returncode == 1
    assert "kubectl get weightversions,weightrollouts -o json" in done.stderr
