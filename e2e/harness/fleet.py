"""Two vLLM pods with a rollout of their own, whose engines do with a version what the test says
(`sabotage`).

They are the sample's Deployment under another name; the sample's own pods are away meanwhile,
because they share the same cores. Everything after `start` goes by ``spec.versionRef``, as a user's
release does. Needs a cluster of this machine.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from e2e.harness import checkpoints, cold, sabotage, samples
from e2e.harness.environment import MODELS_IN_PODS, NAMESPACE, SAMPLES, SYSTEM, Environment
from e2e.harness.kubectl import eventually
from e2e.harness.sabotage import Sabotage
from e2e.harness.tape import Body, Tape, record

NAME = "way-back"
SELECTOR = f"app={NAME}"
GOOD = ("v0", "v1")
BAD = "v2"
MISFIT = "misfit"
START_SECONDS = 900.0  # two engines that start together may take five minutes each

_API = "/apis/hotweights.dev/v1alpha1"
_NOT_YET = ("EngineNotConnected", "EngineStarting", "EngineIncomplete")


class Fleet:
    """The pods and their rollout."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.kubectl = environment.in_samples
        self.sabotage = Sabotage(environment.models)
        self.digests: dict[str, str] = {}  # by version

    def start(self) -> None:
        """The sample's pods go, if they are there; ours come, and serve v0."""
        if self._has_samples():
            self.kubectl("scale", "deployment/tiny-llama", "--replicas=0")
            eventually("the sample's pods gone", lambda: not self.kubectl.pods("app=tiny-llama"))
        else:
            samples.make_namespace(self.environment)
        shutil.copytree(cold.made(BAD), self._folder(BAD), dirs_exist_ok=True)
        checkpoints.transpose(
            checkpoints.copy(self._folder("v1"), MISFIT), "model.layers.0.mlp.down_proj.weight"
        )
        for version in (*GOOD, BAD, MISFIT):
            self._apply("WeightVersion", f"tiny-llama-{version}", _version(version))
        self.renew()
        for version in (*GOOD, BAD, MISFIT):
            self.digests[version] = eventually(
                f"{version} resolved", functools.partial(self._digest, version)
            )

    def renew(self) -> None:
        """A new Deployment and a new rollout, at v0: where nothing else helps, and to begin
        with.
        """
        self.sabotage.clear()
        for thing in (f"weightrollout/{NAME}", f"deployment/{NAME}"):
            self.kubectl("delete", thing, "--ignore-not-found", "--wait=true", timeout_seconds=300)
        eventually("no pods", lambda: not self.kubectl.pods(SELECTOR))
        self._apply(
            "WeightRollout", NAME, {"versionRef": {"name": "tiny-llama-v0"}, "target": _target()}
        )
        self.kubectl("apply", "--filename", "-", stdin=_deployment())
        self.until_ready()

    def freshen(self) -> None:
        """New pods, where the kubelet would wait long before it restarts the containers of those
        that there are.
        """
        self.scale(0)
        eventually("no pods", lambda: not self.kubectl.pods(SELECTOR))
        self.scale(2)
        eventually("two pods", lambda: len(self.kubectl.pods(SELECTOR)) == 2)
        self.until_ready()

    def stop(self) -> None:
        """As it was before; the sample's pods come back by themselves."""
        self.sabotage.clear()
        for thing in (f"weightrollout/{NAME}", f"deployment/{NAME}"):
            self.kubectl("delete", thing, "--ignore-not-found", "--wait=false")
        if self._has_samples():
            self.kubectl("scale", "deployment/tiny-llama", "--replicas=2")

    def scale(self, replicas: int) -> None:
        """So many pods."""
        self.kubectl("scale", f"deployment/{NAME}", f"--replicas={replicas}")

    def lead_to(self, version: str) -> int:
        """Set ``versionRef`` and nothing else; the generation that says so."""
        return self._patch({"versionRef": {"name": f"tiny-llama-{version}"}})

    def set_policy(self, max_failed: int, action: str, min_ready_seconds: int) -> None:
        """How the rollout is to take failures; while it is complete."""
        policy = {"maxFailed": max_failed, "action": action}
        self._patch({"failurePolicy": policy, "minReadySeconds": min_ready_seconds})

    def until_ready(self) -> None:
        """Wait as a user waits, for the generation that there is."""
        eventually(
            "Ready",
            lambda: is_ready(rollout := self.rollout(), rollout["metadata"]["generation"]),
            START_SECONDS,
        )

    def rollout(self) -> Body:
        """As it is now."""
        return self.kubectl.get("weightrollout", NAME)

    @contextmanager
    def tape(self) -> Iterator[Tape]:
        """What is said of all this from now on."""
        one = f"?fieldSelector=metadata.name%3D{NAME}"
        paths = {
            "pod": f"/api/v1/namespaces/{NAMESPACE}/pods?labelSelector=app%3D{NAME}",
            "rollout": f"{_API}/namespaces/{NAMESPACE}/weightrollouts{one}",
            "node": f"{_API}/namespaces/{SYSTEM}/nodeweights",
        }
        with record(self.kubectl, paths) as tape:
            yield tape

    def _has_samples(self) -> bool:
        return bool(
            self.kubectl(
                "get", "deployment", "tiny-llama", "--ignore-not-found", "--output", "name"
            ).strip()
        )

    def _patch(self, spec: Body) -> int:
        text = self.kubectl(
            "patch",
            "weightrollout",
            NAME,
            "--type=merge",
            "--patch",
            json.dumps({"spec": spec}),
            "--output",
            "json",
        )
        return int(json.loads(text)["metadata"]["generation"])

    def _digest(self, version: str) -> str:
        body = self.kubectl.get("weightversion", f"tiny-llama-{version}")
        return str(body.get("status", {}).get("digest", ""))

    def _folder(self, version: str) -> Any:
        return self.environment.models / "tiny-llama" / version

    def _apply(self, kind: str, name: str, spec: Body) -> None:
        metadata = {"name": name, "namespace": NAMESPACE}
        body = {
            "apiVersion": "hotweights.dev/v1alpha1",
            "kind": kind,
            "metadata": metadata,
            "spec": spec,
        }
        self.kubectl("apply", "--filename", "-", stdin=json.dumps(body))


def is_ready(rollout: Body, generation: int) -> bool:
    """Whether the rollout says that it is, of this generation or a later one."""
    status = rollout.get("status", {})
    said = [c["status"] for c in status.get("conditions", []) if c["type"] == "Ready"]
    return said == ["True"] and status.get("observedGeneration", 0) >= generation


def engines(tape: Tape) -> dict[str, Body]:
    """What the agents say of every engine, by pod UID."""
    return {
        engine["podUID"]: engine
        for node in tape.latest("node")
        for engine in node.get("status", {}).get("engines", [])
    }


def words(tape: Tape, uid: str, since: float = 0.0) -> list[Body]:
    """What the agents said of one pod's engine, one after the other, since that moment."""
    return [
        engine
        for said in tape.said
        if said.kind == "node" and said.at >= since
        for engine in said.body.get("status", {}).get("engines", [])
        if engine["podUID"] == uid
    ]


def restarts(pod: Body) -> int:
    """How often its container was started again."""
    statuses = pod.get("status", {}).get("containerStatuses", [])
    return int(statuses[0]["restartCount"]) if statuses else 0


def can_serve(pod: Body, engine: Body | None) -> bool:
    """Whether it could serve what it is told: its container runs, and its engine asks what that is,
    or is told already.
    """
    statuses = pod.get("status", {}).get("containerStatuses", [])
    runs = bool(statuses) and "running" in statuses[0]["state"]
    return (
        runs
        and engine is not None
        and engine["phase"] != "Disconnected"
        and engine.get("reason", "") not in _NOT_YET
    )


def could_serve_since(tape: Tape, until: float) -> float:
    """Since when, at this moment, all pods could serve; monotonic seconds, 0 if none ever could
    not.
    """
    pods: dict[str, Body] = {}
    nodes: dict[str, Body] = {}
    since, could = 0.0, True
    for said in tape.said:
        if said.at > until or said.kind == "rollout":
            continue
        known = pods if said.kind == "pod" else nodes
        known[said.name] = said.body
        if said.gone:
            del known[said.name]
        words = {
            e["podUID"]: e
            for node in nodes.values()
            for e in node.get("status", {}).get("engines", [])
        }
        can = all(can_serve(pod, words.get(pod["metadata"]["uid"])) for pod in pods.values())
        since = said.at if can and not could else since
        could = can
    return since


def _version(version: str) -> Body:
    uri = f"file://{MODELS_IN_PODS}/tiny-llama/{version}"
    return {"model": "tiny-llama", "version": version, "source": {"uri": uri}}


def _target() -> Body:
    return {"selector": {"matchLabels": {"app": NAME}}}


def _deployment() -> str:
    """The sample's, with our name and the plugin."""
    body: Body = next(yaml.safe_load_all((SAMPLES / "vllm.yaml").read_text()))
    body["metadata"]["name"] = NAME
    spec = body["spec"]
    spec["selector"]["matchLabels"]["app"] = spec["template"]["metadata"]["labels"]["app"] = NAME
    pod = spec["template"]["spec"]
    for constraint in pod["topologySpreadConstraints"]:
        constraint["labelSelector"]["matchLabels"]["app"] = NAME
    pod["terminationGracePeriodSeconds"] = 5
    pod["containers"][0]["env"] += [
        {"name": name, "value": value} for name, value in sabotage.VARIABLES.items()
    ]
    return json.dumps(body)
