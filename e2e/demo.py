"""``make demo``: from ``kubectl apply`` to new weights in running vLLM pods, with the evidence.

It does what a user does, with the samples word for word, and then asks the questions that a user
would ask: does every pod now answer as a vLLM that was started cold on the new checkpoint? How long
did it pause? Did any client notice? And how long does the same change take by ``kubectl rollout
restart``? The answers go to the terminal and to ``build/demo.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.harness import samples
from e2e.harness.environment import (
    MODELS_IN_PODS,
    NAMESPACE,
    RELEASE,
    ROOT,
    SAMPLES,
    SYSTEM,
    Environment,
    NotSet,
    diagnose,
    provide,
)
from e2e.harness.kubectl import CommandFailed, TimedOut
from e2e.harness.reach import reach
from e2e.harness.story import say, step, table
from e2e.harness.traffic import Traffic, complete_ids
from localcluster import ClusterError
from localvllm import models
from localvllm.build import BuildError

PROMPT = tuple(range(30, 70))
TOKENS = 24
LABEL = "app=tiny-llama"
READY_SECONDS = 300
RESTART_SECONDS = 900
QUESTIONS = (
    ("get", "weightrollouts"),
    ("get", "wroll", "-o", "wide"),
    ("get", "wver"),
    ("get", "nw", "-A"),
    ("get", "pods", "-L", "hotweights.dev/version"),
    ("describe", "wroll", "tiny-llama"),
)
"""What a user asks when a rollout is complete; the answers are in ``build/story.txt`` too, and the
README quotes them.
"""


@dataclass(frozen=True, slots=True)
class PodResult:
    """What the change of weights did to one pod."""

    name: str
    node: str
    version_before: str
    version_after: str
    pause_seconds: float
    hot_equals_cold: bool
    differs_from_old: bool


@dataclass(frozen=True, slots=True)
class Result:
    """The evidence."""

    pods: tuple[PodResult, ...]
    apply_to_ready_seconds: float
    restart_seconds: float
    client_requests: int
    client_failures: int
    unreached: tuple[str, ...]  # addresses that answered no client

    @property
    def ratio(self) -> float:
        """How many times faster than the restart."""
        return self.restart_seconds / self.apply_to_ready_seconds

    def to_json(self) -> dict[str, Any]:
        """As ``build/demo.json`` has it."""
        return {
            "pods": [
                {
                    "name": pod.name,
                    "node": pod.node,
                    "versionBefore": pod.version_before,
                    "versionAfter": pod.version_after,
                    "pauseSeconds": pod.pause_seconds,
                    "hotEqualsCold": pod.hot_equals_cold,
                    "differsFromOld": pod.differs_from_old,
                }
                for pod in self.pods
            ],
            "applyToReadySeconds": round(self.apply_to_ready_seconds, 3),
            "restartSeconds": round(self.restart_seconds, 3),
            "ratio": round(self.ratio, 1),
            "clientRequests": self.client_requests,
            "clientFailures": self.client_failures,
        }

    def failures(self) -> list[str]:
        """What the demo promised and did not show."""
        problems = [] if self.pods and self.client_requests else ["nothing was compared"]
        problems += [f"no client was answered by {address}" for address in self.unreached]
        problems += [
            f"{p.name} does not answer like a cold start"
            for p in self.pods
            if not p.hot_equals_cold
        ]
        problems += [f"{p.name} answers as before" for p in self.pods if not p.differs_from_old]
        problems += [
            f"{p.name} carries version {p.version_after}"
            for p in self.pods
            if p.version_after != "v1"
        ]
        if self.client_failures:
            problems.append(f"{self.client_failures} of {self.client_requests} requests failed")
        return problems


def hot(
    environment: Environment, cold_ids: list[int]
) -> tuple[tuple[PodResult, ...], float, Traffic]:
    """The rollout, under traffic; per-pod results, seconds from apply to Ready, and what the client
    saw.
    """
    kubectl = environment.in_samples
    before = kubectl.pods(LABEL)
    with reach(environment, before, 8000) as addresses:
        old = [complete_ids(address, PROMPT, TOKENS) for address in addresses]
        with Traffic(addresses) as traffic:
            time.sleep(2)  # traffic is under way before anything changes
            say(
                "$ kubectl apply -f config/samples/weightversion.yaml -f "
                "config/samples/weightrollout.yaml"
            )
            began = time.monotonic()
            say(
                kubectl.apply(
                    SAMPLES / "weightversion.yaml", SAMPLES / "weightrollout.yaml"
                ).rstrip()
            )
            kubectl(
                "wait",
                "--for=condition=Ready",
                "weightrollout/tiny-llama",
                f"--timeout={READY_SECONDS}s",
                timeout_seconds=READY_SECONDS + 10,
            )
            seconds = time.monotonic() - began
            time.sleep(2)
        new = [complete_ids(address, PROMPT, TOKENS) for address in addresses]
    after = {pod["metadata"]["uid"]: pod for pod in kubectl.pods(LABEL)}
    pauses = samples.engine_status(environment)
    results = []
    for pod, old_ids, new_ids in zip(before, old, new, strict=True):
        uid = pod["metadata"]["uid"]
        results.append(
            PodResult(
                name=pod["metadata"]["name"],
                node=pod["spec"]["nodeName"],
                version_before=pod["metadata"]["labels"].get("hotweights.dev/version", ""),
                version_after=after[uid]["metadata"]["labels"].get("hotweights.dev/version", "")
                if uid in after
                else "gone",
                pause_seconds=pauses.get(uid, {}).get("pauseSeconds", 0.0),
                hot_equals_cold=new_ids == cold_ids,
                differs_from_old=new_ids != old_ids,
            )
        )
    return tuple(results), seconds, traffic


def restart(environment: Environment) -> float:
    """The same change without Hotweights: the new checkpoint in the old one's place, and ``kubectl
    rollout restart``.
    """
    kubectl = environment.in_samples
    kubectl("delete", "weightrollout", "tiny-llama", "--wait=true")
    with new_checkpoint(environment) as command:
        began = time.monotonic()
        kubectl(*command)
        kubectl(
            "rollout",
            "status",
            "deployment/tiny-llama",
            f"--timeout={RESTART_SECONDS}s",
            timeout_seconds=RESTART_SECONDS + 10,
        )
        return time.monotonic() - began


@contextmanager
def new_checkpoint(environment: Environment) -> Iterator[tuple[str, ...]]:
    """The new checkpoint where restarted pods find it, and how to restart them."""
    # the nodes' folders are out of reach, so the template names the new one instead
    if environment.cluster is None:
        path, value = "/spec/template/spec/containers/0/args/0", f"{MODELS_IN_PODS}/tiny-llama/v1"
        patch = json.dumps([{"op": "replace", "path": path, "value": value}])
        yield ("patch", "deployment", "tiny-llama", "--type=json", "--patch", patch)
        return
    boot = environment.models / "tiny-llama" / "v0"
    boot.rename(boot.with_name("v0.old"))
    shutil.copytree(environment.models / "tiny-llama" / "v1", boot)
    try:
        yield ("rollout", "restart", "deployment/tiny-llama")
    finally:
        shutil.rmtree(boot)
        boot.with_name("v0.old").rename(boot)


def tell(result: Result) -> None:
    """The table, last on the terminal."""
    say()
    say(
        table(
            ("POD", "NODE", "BEFORE", "AFTER", "PAUSE", "HOT == COLD", "DIFFERS FROM OLD"),
            [
                (
                    pod.name,
                    pod.node,
                    pod.version_before,
                    pod.version_after,
                    f"{pod.pause_seconds * 1000:.0f} ms",
                    "yes" if pod.hot_equals_cold else "NO",
                    "yes" if pod.differs_from_old else "NO",
                )
                for pod in result.pods
            ],
        )
    )
    say()
    say(f"apply → Ready            {result.apply_to_ready_seconds:7.1f} s")
    say(
        f"kubectl rollout restart  {result.restart_seconds:7.1f} s   ({result.ratio:.0f} times as "
        "long)"
    )
    say(
        f"client requests          {result.client_requests:7d}     ({result.client_failures} "
        "failed)"
    )


def show(environment: Environment, *arguments: str) -> str:
    """A command and what it prints, said, and given back for whoever quotes it."""
    shown = f"$ kubectl {' '.join(arguments)}\n{environment.in_samples(*arguments)}"
    say(shown)
    return shown


def run(environment: Environment) -> Result:
    """Everything, on a cluster that is ready."""
    with step("what a vLLM answers that is started cold on v1"):
        cold_ids = models.greedy_text(environment.models / "tiny-llama" / "v1", [PROMPT], TOKENS)[0]
    with step("two vLLM pods that serve v0, one on each node"):
        samples.start_pods(environment)
    story = [show(environment, "get", "pods", "-L", "hotweights.dev/version", "-o", "wide")]
    with step("the hot way, while a client sends completions to both pods"):
        pods, seconds, traffic = hot(environment, cold_ids)
    story += [show(environment, *arguments) for arguments in QUESTIONS]
    written("story.txt", "\n".join(story))
    for failure in traffic.failures[:5]:
        say(f"failed request: {failure}")
    with step("the same change by kubectl rollout restart"):
        restart_seconds = restart(environment)
    unreached = tuple(address for address, count in traffic.answered.items() if not count)
    return Result(
        pods, seconds, restart_seconds, traffic.requests, len(traffic.failures), unreached
    )


def written(name: str, text: str) -> Path:
    """A file of the demo's in ``build``."""
    path = ROOT / "build" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def main() -> int:
    """0 when everything that the demo promises was shown."""
    parser = argparse.ArgumentParser(
        prog="python -m e2e.demo",
        description="From kubectl apply to new weights, with the evidence.",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="leave the cluster up (stop it with `make cluster-down`)",
    )
    arguments = parser.parse_args()
    environment: Environment | None = None
    try:
        environment = provide()
        result = run(environment)
    except (CommandFailed, TimedOut, ClusterError, BuildError, NotSet, OSError) as error:
        if environment is not None:
            say(
                "what the cluster looked like is in "
                f"{written('demo-diagnosis.txt', diagnose(environment))}"
            )
        print(f"demo: {error}", file=sys.stderr)
        return 1
    finally:
        if environment is not None and environment.cluster is not None and not arguments.keep:
            environment.cluster.down()
    written("demo.json", json.dumps(result.to_json(), indent=2) + "\n")
    if environment.cluster is None:
        say(
            f"left on your cluster: the release {RELEASE} in {SYSTEM}, and the namespace "
            f"{NAMESPACE}"
        )
    tell(result)
    problems = result.failures()
    for problem in problems:
        print(f"demo: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
