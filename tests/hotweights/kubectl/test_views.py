"""What the plugin says of objects: facts in, text out."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from hotweights.kubectl import history
from hotweights.kubectl.views import checks, estimates, foresight, picture, plan_text, tree
from hotweights.kubectl.views.checks import Facts, Right
from hotweights.kubectl.views.verdict import verdict
from hotweights_crds import v1alpha1
from hotweights_operator.runtime import observe
from tests.hotweights.kubectl import scenes
from tests.hotweights.kubectl.scenes import digest, named

Body = dict[str, Any]
Fleet = dict[str, list[Body] | None]


def drawn(bodies: Fleet, **options: Any) -> str:
    shot = scenes.snap(bodies)
    return tree.plain([*tree.lines(picture.pictures(shot), **options), *tree.notes(shot)])


def test_a_canary_that_waits_is_drawn_with_its_steps_nodes_and_pods() -> None:
    found = drawn(scenes.fleet(scenes.rollout(scenes.CANARY, scenes.WAITS)))
    assert (
        found
        == """\
models/tiny  v1 → v2  Paused  revision 2, 3 min
│  step 2 of 3: waits for a promotion; 1 of 3 pods serve v2
│  pods   ██████░░░░░░░░░░░░░░  1 of 3 updated, 3 prepared, 3 available
│  bytes  ████████████████████  10.0MiB of 10.0MiB on 2 of 2 nodes
├─ steps
│  ├─ ✔ setReplicas 1
│  ├─ ● pause until promoted  waits for a promotion, for 2 min
│  └─ ○ setReplicas 50%
├─ node-0  ████████████████████  5.0MiB staged
│  ├─ ✔ tiny-a  v2  Updated   Golden, paused 59 ms
│  └─ ◐ tiny-b  v1  Prepared  Golden, paused 59 ms, Beside
└─ node-1  ████████████████████  5.0MiB staged
   └─ ✘ tiny-c  v1  Failed  Golden, paused 59 ms, ShapeMismatch: lm_head.weight is (2, 3), the model has (2, 4)
"""
    )


def test_a_narrow_terminal_breaks_notes_and_nothing_else() -> None:
    wide = drawn(scenes.fleet())
    narrow = drawn(scenes.fleet(), width=70)
    assert max(map(len, narrow.splitlines())) <= 70
    assert "".join(narrow.split()).replace("│", "") == "".join(wide.split()).replace("│", "")


def test_what_may_not_be_read_is_said_and_no_pod_serves_anything_then() -> None:
    found = drawn({**scenes.fleet(), "state": None, "node": None, "agent": None})
    assert "✔ tiny" not in found
    assert "? tiny-a  shows v2  Unknown  its label shows v2" in found
    assert "you may not list them: NodeWeights, nodes, the agents' pods" in found


def test_a_label_alone_is_no_proof() -> None:
    bodies = scenes.fleet()
    state = (bodies["state"] or [])[0]
    state["status"]["engines"][0]["confirmedAt"] = "2026-11-22T10:59:00Z"  # of its life before
    found = drawn(bodies)
    assert "Updated" not in found
    assert "tiny-a  shows v2  Changing" in found


def test_nodes_that_stage_or_cannot_are_told_apart() -> None:
    bodies = scenes.fleet()
    states = bodies["state"] or []
    half = {"phase": "Fetching", "bytesDone": scenes.SIZE // 2}
    states[0]["status"]["staged"][1].update(half)
    failed = {"phase": "Failed", "reason": "SourceNotFound", "message": "no such folder"}
    states[1]["status"]["staged"][1].update(failed)
    found = drawn(bodies)
    assert "node-0  ██████████░░░░░░░░░░  staging, 2.5MiB of 5.0MiB" in found
    assert "SourceNotFound: no such folder" in found


def test_pods_without_agent_engine_or_node_are_named_so() -> None:
    bodies = scenes.fleet()
    bodies["agent"] = [scenes.agent("node-0"), scenes.agent("node-1", ready=False)]
    (bodies["state"] or [])[1]["status"]["engines"] = [scenes.engine("tiny-c", "v1")]
    (bodies["state"] or [])[0]["status"]["engines"][1] = {
        "podUID": "uid-tiny-b", "phase": "Disconnected", "reason": "EngineNotConnected"
    }  # fmt: skip
    (bodies["pod"] or []).append(scenes.pod("tiny-d", ""))
    found = drawn(bodies)
    assert "NoAgent" in found
    assert "NotConnected" in found
    assert "no node yet" in found


def test_of_a_large_fleet_what_is_done_is_counted() -> None:
    bodies = large(60)
    found = drawn(bodies)
    assert "and 20 nodes more, all of their 20 pods updated" in found
    assert drawn(bodies, folds=False).count("Updated") == 60


def large(nodes: int) -> Fleet:
    """All pods of all nodes serve v2."""
    names = [f"{number:02}" for number in range(nodes)]
    bodies = scenes.fleet(complete())
    bodies["pod"] = [scenes.pod(f"tiny-{n}", f"node-{n}", "v2") for n in names]
    bodies["node"] = [scenes.node(f"node-{n}") for n in names]
    bodies["agent"] = [scenes.agent(f"node-{n}") for n in names]
    bodies["state"] = [
        scenes.node_weights(
            f"node-{n}", [scenes.told(f"tiny-{n}", "v2")], [scenes.engine(f"tiny-{n}", "v2")]
        )
        for n in names
    ]
    return bodies


def complete(version: str = "v2", **spec: Any) -> Body:
    """A rollout at its end."""
    status = {
        "phase": "Complete",
        "message": f"all 3 pods serve {version}",
        "target": named(version),
        "stable": named(version),
        "previous": {},
        "conditions": [scenes.condition("Ready", "True", "Complete")],
        "history": [
            {
                "revision": 2,
                "version": version,
                "outcome": "Complete",
                "startedAt": "2026-11-22T12:07:00Z",
                "finishedAt": "2026-11-22T12:10:00Z",
            }
        ],
    }
    return scenes.rollout({"versionRef": {"name": f"tiny-{version}"}, **spec}, status)


def test_a_picture_is_for_programs_too() -> None:
    (found,) = picture.pictures(scenes.snap())
    body = found.to_dict()
    assert body["nodes"][1]["pods"][0] | {"message": ""} == {
        "name": "tiny-c", "uid": "uid-tiny-c", "state": "Failed", "serves": "v1", "shows": "v1",
        "ready": True, "way": "", "probe": "Golden", "pauseSeconds": 0.059,
        "reason": "ShapeMismatch", "message": "",
    }  # fmt: skip
    assert (body["bytesDone"], body["bytesTotal"]) == (2 * scenes.SIZE, 2 * scenes.SIZE)


# -- verdicts -----------------------------------------------------------------------------------

STALLED = scenes.condition("Stalled", "True", "ShapeMismatch", "tiny-c")
BACK = {"from": "tiny-v2", "to": named("v1"), "by": "Command", "reason": "Requested"}


@pytest.mark.parametrize(
    ("body", "outcome", "reason"),
    [
        (scenes.rollout(), "Waiting", "Activating"),
        (scenes.rollout(scenes.CANARY, scenes.WAITS), "Waiting", "Paused"),
        (complete(), "Complete", "Complete"),
        # of the generation before
        ({**complete(), "metadata": scenes.rollout(generation=3)["metadata"]}, "Waiting", "NotObserved"),
        (scenes.rollout(status={"conditions": [STALLED]}), "Degraded", "ShapeMismatch"),
        (scenes.rollout(status={"abortedRevision": 2}), "Aborted", "Aborted"),
        (scenes.rollout(status={"rolledBack": BACK}), "RolledBack", "Requested"),
    ],
)  # fmt: skip
def test_a_rollout_has_come_to_an_end_or_not(body: Body, outcome: str, reason: str) -> None:
    found = verdict(observe.rollout(body))
    assert (found.outcome, found.reason) == (outcome, reason)


def test_history_has_the_revision_under_way_first() -> None:
    body = complete()
    body["status"] |= {"revision": 3, "revisionStartedAt": scenes.START, "target": named("v3")}
    assert history.text(history.entries(observe.rollout(body))) == (
        "REVISION   VERSION   OUTCOME    STARTED                TOOK\n"
        "3          v3        Complete   2026-11-22T11:00:00Z   -\n"
        "2          v2        Complete   2026-11-22T12:07:00Z   3 min\n"
    )


# -- plans --------------------------------------------------------------------------------------


def calm(**spec: Any) -> Fleet:
    """Three pods on two nodes that serve v1, and know nothing of v2."""
    bodies = scenes.fleet(complete("v1", **spec))
    bodies["pod"] = [
        scenes.pod("tiny-a", "node-0"), scenes.pod("tiny-b", "node-0"), scenes.pod("tiny-c", "node-1")
    ]  # fmt: skip
    bodies["state"] = [
        scenes.node_weights(
            node,
            [scenes.told(pod, "v1") for pod in pods],
            [scenes.engine(pod, "v1") for pod in pods],
            [scenes.staged("v1")],
        )
        for node, pods in {"node-0": ["tiny-a", "tiny-b"], "node-1": ["tiny-c"]}.items()
    ]
    return bodies


def planned(bodies: Fleet, to: str = "v2") -> plan_text.Plan:
    shot = scenes.snap(bodies)
    version = shot.version(to, "models")
    assert version is not None
    (rollout,) = shot.rollouts
    return plan_text.Plan(
        shot,
        rollout,
        version,
        foresight.foresee(shot, rollout, version, estimates.measured(shot)),
    )


def test_a_plan_has_the_operators_order_and_where_its_canary_waits() -> None:
    found = planned(calm(**scenes.CANARY))
    assert (
        found.text()
        == """\
models/tiny: v1 → v2, Rolling: at most 1 of 3 pods unavailable; canary of 3 steps

STAGE
NODE     BYTES            FROM         TAKES
node-0   at most 5.0MiB   the source   about 500 ms, as its last
node-1   at most 5.0MiB   node-0       about 500 ms, as its last

CHANGE, in this order
    POD      NODE     AT       PAUSE                      STEP
1   tiny-a   node-0   +0.5 s   about 59 ms, as its last   1: setReplicas 1
    -                                                     2: pause until promoted
2   tiny-c   node-1   +0.6 s   about 59 ms, as its last   3: setReplicas 50%
3   tiny-b   node-0   +0.6 s   about 59 ms, as its last   the rest

IN ALL
about 0.7 s + as long as engines take to prepare + as long as somebody takes for a promotion

NOTES
- bytes are at most: chunks that a node has of another version are not fetched again, and no status says how many those are
- played without failures; a version that engines refuse ends it as failurePolicy says
"""
    )
    assert found.found.complete
    assert [change["pod"] for change in found.to_dict()["changes"]] == [
        "tiny-a",
        "tiny-c",
        "tiny-b",
    ]


def test_a_plan_keeps_min_ready_seconds_and_timed_pauses() -> None:
    steps = [{"setReplicas": 1}, {"pause": {"durationSeconds": 600}}]
    found = planned(calm(strategy={"canary": {"steps": steps}}, minReadySeconds=30)).found
    assert [wait.kind for wait in found.waits] == ["Time"]
    times = [round(change.at_seconds) for change in found.changes]
    assert times[1] - times[0] >= 630
    assert times[2] - times[1] == 30


def test_all_at_once_is_all_at_once() -> None:
    found = planned(calm(strategy={"type": "AllAtOnce"})).found
    assert len({change.at_seconds for change in found.changes}) == 1


def test_what_keeps_a_pod_back_now_keeps_it_back_in_a_plan() -> None:
    bodies = calm()
    bodies["agent"] = [scenes.agent("node-0"), scenes.agent("node-1", ready=False)]
    found = planned(bodies)
    assert [change.pod for change in found.found.changes] == ["tiny-a", "tiny-b"]
    assert "tiny-c   node-1   AgentMissing" in found.text()
    assert "it would not complete" in found.text()


def test_a_plan_says_what_was_never_measured() -> None:
    bodies = calm()
    for state in bodies["state"] or []:
        state["status"]["staged"][0]["seconds"] = 0.0
        for engine in state["status"]["engines"]:
            engine["pauseSeconds"] = 0.0
    text = planned(bodies).text()
    assert "never measured here" in text
    assert "its bound is 60 s (activation.commitTimeoutSeconds)" in text
    assert "staging counts as 0 s" in text


def test_a_node_without_room_is_named() -> None:
    bodies = calm()
    (bodies["state"] or [])[1]["status"]["capacity"]["freeBytes"] = 1024
    assert (
        "node-1's agent has 1.0KiB free and the version takes up to 5.0MiB"
        in planned(bodies).text()
    )


def test_a_way_back_takes_no_steps() -> None:
    bodies = calm(**scenes.CANARY)
    (bodies["rollout"] or [])[0]["status"] |= {"previous": named("v2"), "earlier": [named("v2")]}
    found = planned(bodies)
    assert not found.found.waits
    assert "a way back, which takes no canary steps" in found.text()


def test_to_what_is_served_already_nothing_happens() -> None:
    text = planned(calm(), "v1").text()
    assert "nothing: every node holds the version" in text
    assert "no pod: none that follows serves anything else" in text


# -- doctor -------------------------------------------------------------------------------------


def of_chart(kind: str, name: str, component: str, status: Body | None = None) -> Body:
    labels = {
        "app.kubernetes.io/name": "hotweights",
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/version": "0.1.0",
    }
    metadata = {"name": f"hotweights-{name}", "namespace": "hotweights-system", "labels": labels}
    return {"kind": kind, "metadata": metadata, "status": status or {}}


def definition(kind: v1alpha1.Kind) -> Body:
    made = v1alpha1.definition(kind)
    return {**made, "status": {"conditions": [{"type": "Established", "status": "True"}]}}


def facts(bodies: Fleet | None = None, **more: Any) -> Facts:
    """An installation in which nothing is wrong, but for ``more``."""
    bodies = bodies or calm()
    well: dict[str, Any] = {
        "definitions": [definition(kind) for kind in v1alpha1.KINDS],
        "deployments": [of_chart("Deployment", "operator", "operator", {"readyReplicas": 1})],
        "daemon_sets": [
            of_chart("DaemonSet", "agent", "agent", {"desiredNumberScheduled": 2, "numberReady": 2})
        ],
        "mutating_policies": [of_chart("MutatingAdmissionPolicy", "inject", "admission")],
        "validating_policies": [of_chart("ValidatingAdmissionPolicy", "inject-check", "admission")],
        "pods": bodies["pod"],
    }
    return Facts(scenes.snap(bodies), "0.1.0", **{**well, **more})


def found(seen: Facts) -> list[tuple[str, str]]:
    return [(finding.level, finding.subject) for finding in checks.examine(seen)]


def test_of_what_is_well_nothing_is_found() -> None:
    assert found(facts()) == []


def older(kind: v1alpha1.Kind) -> Body:
    """The definition of a release that had no status.lastCommand."""
    body = copy.deepcopy(definition(kind))
    schema = body["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    schema["status"]["properties"].pop("conditions", None)
    return body


@pytest.mark.parametrize(
    ("more", "level", "subject"),
    [
        ({"definitions": []}, "Error", "CustomResourceDefinition weightversions.hotweights.dev"),
        ({"definitions": [older(k) for k in v1alpha1.KINDS]}, "Error", "CustomResourceDefinition weightrollouts.hotweights.dev"),
        ({"definitions": None}, "Unknown", "CustomResourceDefinitions"),
        ({"deployments": []}, "Error", "the operator"),
        ({"deployments": [of_chart("Deployment", "operator", "operator")]}, "Error", "Deployment hotweights-system/hotweights-operator"),
        ({"daemon_sets": []}, "Error", "the agents"),
        ({"daemon_sets": [of_chart("DaemonSet", "agent", "agent", {"desiredNumberScheduled": 2})]}, "Error", "DaemonSet hotweights-system/hotweights-agent"),
        ({"mutating_policies": []}, "Error", "the policy hotweights-inject"),
        ({"mutating_policies": None, "absent": frozenset({"MutatingAdmissionPolicy"})}, "Warning", "MutatingAdmissionPolicy"),
        ({"validating_policies": []}, "Warning", "the policy hotweights-inject-check"),
        ({"refused": [Right("patch", "hotweights.dev", "weightrollouts", "to steer")]}, "Warning", "your rights"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_installation_is_found(more: Body, level: str, subject: str) -> None:
    assert (level, subject) in found(facts(**more))


def test_what_is_wrong_with_pods_nodes_and_versions_is_found() -> None:
    bodies = calm()
    pods, states = bodies["pod"] or [], bodies["state"] or []
    del pods[0]["spec"]["readinessGates"]
    states[0]["status"]["engines"].pop(1)
    states[1]["status"]["agentVersion"] = "0.0.9"
    bodies["agent"] = [scenes.agent("node-0")]
    no = scenes.condition("Resolved", "False", "SourceNotFound", "no such folder on node-0")
    (bodies["version"] or []).append(scenes.version("v3", {"conditions": [no]}))
    (bodies["rollout"] or [])[0]["status"]["conditions"] = [STALLED]
    (bodies["rollout"] or [])[0]["metadata"]["annotations"] = {
        "hotweights.dev/command": "pause 2 x"
    }
    assert found(facts(bodies)) == [
        ("Error", "node node-1"),
        ("Error", "WeightVersion models/tiny-v3"),
        ("Error", "WeightRollout models/tiny"),
        ("Error", "pod models/tiny-a"),
        ("Error", "pod models/tiny-b"),
        ("Warning", "WeightRollout models/tiny"),
        ("Warning", "releases"),
    ]


def test_a_version_that_a_node_cannot_stage_is_found() -> None:
    bodies = calm()
    failed = {
        "digest": digest("v2"),
        "version": "v2",
        "phase": "Failed",
        "reason": "SourceUnreadable",
    }
    (bodies["state"] or [])[0]["status"]["staged"].append(failed)
    assert found(facts(bodies)) == [("Error", "node node-0")]
