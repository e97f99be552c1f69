"""The objects that Argo CD's Lua is tried on: each status is what the operator's decisions make of
a small world, so that none of them is wishful. ``python -m tests.argocd.scenes`` writes them.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from hotweights_crds.nodeweights import ResolvedVersion, ResolveItem, StagedVersion
from hotweights_operator.decide import versions
from hotweights_operator.model.objects import Rollout, Version
from hotweights_operator.model.observed import Observed
from tests.operator.worlds import (
    AT_NEW,
    DONE,
    NEW,
    NOW,
    OLD,
    Fields,
    after,
    engine,
    gave_up,
    pod,
    prepared,
    rollout,
    state,
    status_after,
    version,
    world,
)

ROOT = Path(__file__).parents[2]
CUSTOMIZATIONS = ROOT / "config" / "argocd" / "resource_customizations" / "hotweights.dev"
HEADER = "# Written by `python -m tests.argocd.scenes`: what the operator decides. Do not edit.\n"
COMMAND = "hotweights.dev/command"
HANDWRITTEN = {"WeightRollout": ("paused-by-command", "waits-for-promotion")}
"""Of states that this release's operator does not come to."""
HEALTH = {
    "WeightRollout": {
        **dict.fromkeys(("complete", "complete-and-paused"), "Healthy"),
        "paused": "Suspended",
        **dict.fromkeys(("paused-by-command", "waits-for-promotion"), "Suspended"),
        **dict.fromkeys(("aborted", "rolled-back", "too-many-failures"), "Degraded"),
        **dict.fromkeys(("no-progress", "target-conflict", "version-broken"), "Degraded"),
        **dict.fromkeys(("new", "not-seen-yet", "being-deleted", "no-pods"), "Progressing"),
        **dict.fromkeys(("version-missing", "resolving", "staging", "activating"), "Progressing"),
    },
    "WeightVersion": {
        "resolved": "Healthy",
        "unreadable": "Degraded",
        **dict.fromkeys(("new", "being-deleted", "no-agent", "resolving"), "Progressing"),
    },
}
"""What Argo CD is to show of each."""
WORDS = {
    ("WeightRollout", "new"): "the operator has not seen this change yet",
    ("WeightRollout", "not-seen-yet"): "the operator has not seen this change yet",
    ("WeightVersion", "new"): "the operator has not seen this version yet",
    ("WeightRollout", "being-deleted"): "it is being deleted",
    ("WeightVersion", "being-deleted"): "it is being deleted",
}
"""Where the sentence is not the operator's."""
Body = dict[str, Any]
_API = "hotweights.dev/v1alpha1"
_PAUSED: Fields = {"paused": True}


def rollouts() -> dict[str, Body]:
    """A WeightRollout in each state that people meet, by the name of the state."""
    serving = world([pod(0), pod(1)], [state("n0", [engine(0), engine(1)], {"p0": OLD, "p1": OLD})])
    ready = world([pod(0), pod(1)], [state("n0", prepared(2), {"p0": OLD, "p1": OLD})])
    new = [engine(0, NEW), engine(1, NEW)]
    there = world(
        [pod(0, shows=NEW), pod(1, shows=NEW)], [state("n0", new, {"p0": NEW, "p1": NEW})]
    )
    bad = [engine(0, failed=gave_up()), engine(1)]
    refused = world([pod(0), pod(1)], [state("n0", bad, {"p0": OLD, "p1": OLD})])
    aborts: Fields = {"failurePolicy": {"action": "Abort"}}
    begun = after(rollout(AT_NEW), ready)
    goes_back: Fields = {"failurePolicy": {"action": "Rollback"}}
    left = after(rollout(AT_NEW, **goes_back), refused)
    other = replace(rollout(AT_NEW), uid="older", name="older", created_at="2025")
    contested = world(
        [pod(0)], [state("n0", [engine(0)], {"p0": OLD})], rollouts=[other, rollout(AT_NEW)]
    )
    scenes: dict[str, Body] = {
        "new": _body(rollout(), {"observedGeneration": -1}),
        "not-seen-yet": _decided(rollout(DONE), there),
        "version-missing": _decided(rollout(AT_NEW, versionRef={"name": "none"}), serving),
        "resolving": _decided(rollout(AT_NEW), _with(serving, version("new", ""))),
        "version-broken": _decided(rollout(AT_NEW), _with(serving, _unreadable())),
        "no-pods": _decided(rollout(AT_NEW), world([], [])),
        "staging": _decided(rollout(AT_NEW), _staging()),
        "activating": _decided(rollout(AT_NEW), ready),
        "paused": _decided(rollout(AT_NEW, **_PAUSED), ready),
        "complete": _decided(rollout(DONE), there),
        "complete-and-paused": _decided(rollout(DONE, **_PAUSED), there),
        "too-many-failures": _decided(rollout(AT_NEW), refused),
        "aborted": _decided(rollout(AT_NEW, **aborts), refused),
        "rolled-back": _decided(after(left, refused), refused),
        "no-progress": _decided(begun, ready, NOW + timedelta(hours=1)),
        "target-conflict": _decided(rollout(AT_NEW), contested),
    }
    scenes["not-seen-yet"]["metadata"]["generation"] += 1
    scenes["being-deleted"] = _decided(replace(rollout(AT_NEW), terminating=True), ready)
    scenes["being-deleted"]["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
    return scenes


def weight_versions() -> dict[str, Body]:
    """A WeightVersion in each state that people meet."""
    waits = version("new", "")
    item = ResolveItem(
        uid=waits.uid, namespace="models", name="new", model="m", version="new", uri="file:///new"
    )

    def answered(*answers: ResolvedVersion) -> Observed:
        known = state("n0")
        asked = replace(
            known,
            spec=known.spec.model_copy(update={"resolve": [item]}),
            status=known.status.model_copy(update={"resolved": list(answers)}),
        )
        return world([], [asked])

    found = ResolvedVersion(uid=waits.uid, digest=NEW, nbytes=16 << 30, tensors=291, chunks=4096)
    lost = ResolvedVersion(
        uid=waits.uid,
        reason="ChecksumMismatch",
        message="model.safetensors: lm_head.weight: chunk 3",
    )
    scenes = {
        "new": _version(waits, None),
        "no-agent": _version(waits, world([], [])),
        "resolving": _version(waits, answered()),
        "resolved": _version(waits, answered(found)),
        "unreadable": _version(waits, answered(lost)),
    }
    scenes["being-deleted"] = _version(waits, answered())
    scenes["being-deleted"]["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
    return scenes


def _staging() -> Observed:
    half = StagedVersion(digest=NEW, phase="Fetching", bytes_done=512, bytes_total=1024)
    held = StagedVersion(digest=OLD, phase="Staged", bytes_done=1024, bytes_total=1024)
    nodes = [state("n0", [engine(0)], {"p0": OLD}, staged=[held, half])]
    return world([pod(0)], nodes)


def _with(seen: Observed, new: Version) -> Observed:
    """The same world, but for the new version."""
    seen.put("version", f"{new.namespace}/{new.name}", new)
    return seen


def _unreadable() -> Version:
    decided = weight_versions()["unreadable"]["status"]
    found = version("new", "")
    return replace(found, status=type(found.status).from_dict(decided))


def _decided(known: Rollout, seen: Observed, now: datetime = NOW) -> Body:
    """The object after a step of the operator."""
    return _body(known, status_after(known, seen, now).to_dict())


def _body(known: Rollout, status: Body) -> Body:
    return {
        "apiVersion": _API,
        "kind": "WeightRollout",
        "metadata": _metadata(known.name, known.namespace, known.generation),
        "spec": known.spec.to_dict(),
        "status": status,
    }


def _version(known: Version, seen: Observed | None) -> Body:
    status: Body = {"observedGeneration": -1}
    if seen is not None:
        decided = versions.decide(known, seen, NOW).status
        if decided is None:
            raise LookupError("a decision without a status")
        status = decided.to_dict()
    return {
        "apiVersion": _API,
        "kind": "WeightVersion",
        "metadata": _metadata(known.name, known.namespace, known.generation),
        "spec": known.spec.to_dict(),
        "status": status,
    }


def _metadata(name: str, namespace: str, generation: int) -> Body:
    return {
        "name": name,
        "namespace": namespace,
        "generation": generation,
        "resourceVersion": "4711",
    }


def text(body: Body) -> str:
    """An object, or a list of cases, as a file."""
    return HEADER + yaml.safe_dump(body, sort_keys=False, width=120)


def files() -> dict[Path, str]:
    """Each file that is written, and what is in it."""
    found: dict[Path, str] = {}
    for kind, decided in (("WeightRollout", rollouts()), ("WeightVersion", weight_versions())):
        folder = CUSTOMIZATIONS / kind
        bodies = {name: text(body) for name, body in decided.items()}
        for name, content in bodies.items():
            found[folder / "testdata" / f"{name}.yaml"] = content
        for name in HANDWRITTEN.get(kind, ()):
            bodies[name] = (folder / "testdata" / f"{name}.yaml").read_text()
        found[folder / "health_test.yaml"] = text(
            {"tests": [_health_case(name, yaml.safe_load(bodies[name])) for name in sorted(bodies)]}
        )
        for case in _action_cases(folder):
            before = yaml.safe_load(bodies[Path(case["inputPath"]).stem])
            after_it = text(_commanded(before, case))
            found[folder / "actions" / case["expectedOutputPath"]] = after_it
    return found


def _health_case(name: str, body: Body) -> Body:
    """What Argo CD is to show: one word of its own, and the operator's sentence."""
    expected = HEALTH[body["kind"]][name]
    status = body["status"]
    ready: Body = next((c for c in status.get("conditions", ()) if c["type"] == "Ready"), {})
    message = WORDS.get((body["kind"], name)) or status.get("message") or ready["message"]
    return {
        "healthStatus": {"status": expected, "message": message},
        "inputPath": f"testdata/{name}.yaml",
    }


def _action_cases(folder: Path) -> list[Body]:
    path = folder / "actions" / "action_test.yaml"
    return list(yaml.safe_load(path.read_text())["actionTests"]) if path.exists() else []


def _commanded(body: Body, case: Body) -> Body:
    """The same object with the annotation that the operator takes commands by."""
    verb = "@".join([case["action"], *case.get("parameters", {}).values()])
    command = f"{verb} {body['status']['revision']} {body['metadata']['resourceVersion']}"
    annotations = {**body["metadata"].get("annotations", {}), COMMAND: command}
    return {**body, "metadata": {**body["metadata"], "annotations": annotations}}


if __name__ == "__main__":
    for path, content in files().items():
        path.write_text(content)
