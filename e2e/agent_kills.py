"""``python -m e2e.agent_kills``: what becomes of a node's versions when its agent is killed, again
and again, under load and with no more memory than the documents ask for.

Two vLLM pods serve a model that is larger than what an agent needs itself. Their agents are killed
by turns, as the kernel's out-of-memory killer would. Each has to find both versions again in the
memory where they lay, fetch nothing of them, and leave the pods alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from e2e.chaos import deeds
from e2e.chaos.deeds import NAME, SELECTOR
from e2e.harness import samples
from e2e.harness.environment import (
    ROOT,
    SAMPLES,
    SYSTEM,
    Environment,
    diagnose,
    install,
    provide,
    publish,
)
from e2e.harness.fleet import is_ready, restarts
from e2e.harness.kubectl import CommandFailed, eventually
from e2e.harness.reach import reach
from e2e.harness.sabotage import kill_container
from e2e.harness.shown import READY, watch_shown
from e2e.harness.story import say, step, table
from e2e.harness.traffic import Traffic
from e2e.own_cluster import run_on_own_cluster
from localcluster.host import cgroups
from localvllm import build as vllm_build
from localvllm import models
from localvllm.models import Model

LAYERS, HIDDEN = 6, 1024  # 229 MB
WEIGHTS_SHARE = 2.5  # what values.yaml says that versions need
OWN_NBYTES = 384 << 20  # and what it says that the agent itself needs, with its reserve
MOST_RESTART_SECONDS = 5  # twenty ends in a row would have a kubelet wait for five minutes each
RECOVERY_SECONDS = 300.0
CLIENTS = 4  # of each pod


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one kill."""

    kill: int
    node: str
    versions: int  # that were staged before, and are again
    restart_seconds: float  # until the kubelet had started the container again
    staged_seconds: float  # from then until all was staged and every engine was back
    fetched_nbytes: float  # by the new process: from peers and the source
    highest_nbytes: int  # memory of the agent's pod, at most, since the pod began
    requests: int
    failed: int


@dataclass(frozen=True, slots=True)
class Result:
    """What came of all."""

    rows: list[Row]
    weights_nbytes: int
    limit_nbytes: int
    oom_kills: int
    unready: list[str]  # pods that were not Ready at any time

    def problems(self) -> list[str]:
        """What is not as it is to be."""
        found = [f"{self.oom_kills} processes ended for want of memory"] if self.oom_kills else []
        found += [f"pod {pod} was not Ready" for pod in self.unready]
        for row in self.rows:
            if row.fetched_nbytes:
                found.append(f"kill {row.kill}: {row.fetched_nbytes:.0f} bytes were fetched again")
            if row.failed:
                found.append(f"kill {row.kill}: {row.failed} requests failed")
            if not row.requests:
                found.append(f"kill {row.kill}: nobody asked the pods anything")
        return found


def main() -> int:
    """0 when every kill was survived, 1 when not, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m e2e.agent_kills",
        description="Agents killed again and again under load, and what became of their versions.",
    )
    parser.add_argument("--kills", type=int, default=20, help="how many (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a row for each kill, as JSON")
    arguments = parser.parse_args()
    if arguments.kills < 1:
        parser.error("--kills: 1 or more")
    return run_on_own_cluster(parser, lambda out: _run(out, arguments.kills, arguments.json))


def _run(out: Console, kills: int, file: Path | None) -> int:
    environment = provide(most_restart_seconds=MOST_RESTART_SECONDS)
    weights_nbytes = put_large_models(environment)
    limit_nbytes = int(WEIGHTS_SHARE * weights_nbytes) + OWN_NBYTES
    install(environment, f"agent.resources.limits.memory={limit_nbytes}")
    with step("two vLLM pods, and both versions on both nodes"):
        samples.start_pods(environment)
        environment.in_samples.apply(SAMPLES / "weightversion.yaml")
        for version in ("v1", "v0"):
            until_complete_on(environment, version)
    result = play(environment, kills, weights_nbytes, limit_nbytes)
    if file is not None:
        file.write_text(json.dumps(asdict(result), indent=2) + "\n")
    rows = [tuple(str(value) for value in asdict(row).values()) for row in result.rows]
    say(table(tuple(asdict(result.rows[0])), rows))
    for problem in result.problems():
        out.print(problem, style="red", markup=False)
    if result.problems():
        seen = ROOT / "build" / "agent-kills.txt"
        seen.parent.mkdir(exist_ok=True)
        seen.write_text(diagnose(environment))
        out.print(f"what the cluster looked like is in {seen}", markup=False)
    out.print(
        f"{len(result.rows)} kills: {result.oom_kills} ended for want of memory, "
        f"{len(result.unready)} pods un-readied"
    )
    return 1 if result.problems() else 0


def put_large_models(environment: Environment) -> int:
    """Both versions of the samples' model, in a larger size; their weights in bytes."""
    made = vllm_build.cache() / "models" / "wide-llama"
    folders = [made / version for version in ("v0", "v1")]
    with step("two versions of a larger Llama"):
        models.make_models(
            [
                Model(folder, "llama", seed, layers=LAYERS, hidden=HIDDEN)
                for seed, folder in enumerate(folders)
            ]
        )
        for folder in folders:
            if not (folder / "hotweights.manifest.json").exists():
                publish(folder, folder.name)
            target = environment.models / NAME / folder.name
            shutil.rmtree(target)
            shutil.copytree(folder, target)
    return (folders[0] / "model.safetensors").stat().st_size


def until_complete_on(environment: Environment, version: str) -> None:
    """The rollout leads to that version, and is complete."""
    deeds.lead_to(environment, version)

    def complete() -> bool:
        rollout = environment.in_samples.get("weightrollout", NAME)
        return is_ready(rollout, rollout["metadata"]["generation"])

    eventually(f"the rollout to {version}", complete, RECOVERY_SECONDS)


def play(environment: Environment, kills: int, weights_nbytes: int, limit_nbytes: int) -> Result:
    """So many kills, one after the other, on the nodes by turns. Needs a cluster of this
    machine.
    """
    if environment.cluster is None:
        raise CommandFailed("containers can be killed on a cluster of this machine only")
    group = cgroups.name_of(environment.cluster.name)
    ended_before = cgroups.oom_kills(group)
    pods = environment.in_samples.pods(SELECTOR)
    rows: list[Row] = []
    with (
        watch_shown(environment.in_samples, SELECTOR, READY) as ready,
        reach(environment, pods, 8000) as addresses,
    ):
        for number in range(1, kills + 1):
            agents = samples.system_pods(environment, "agent")
            with step(f"kill {number} of {kills}"), Traffic(addresses, plain=CLIENTS) as traffic:
                row = _kill(environment, number, agents[number % len(agents)], traffic)
            rows.append(row)
    oom_kills = cgroups.oom_kills(group) - ended_before
    return Result(rows, weights_nbytes, limit_nbytes, oom_kills, sorted(ready.lacked))


def _kill(environment: Environment, number: int, agent: dict[str, Any], traffic: Traffic) -> Row:
    name, node = agent["metadata"]["name"], agent["spec"]["nodeName"]
    lives, old = restarts(agent), _status(environment, node)
    before = _staged(old)
    if not before:
        raise CommandFailed(f"nothing is staged on {node}: a kill would show nothing")
    kill_container(environment, agent, "agent")
    killed_at = time.monotonic()

    def started() -> Any:
        found = _agent(environment, name)
        status = next(s for s in found["status"]["containerStatuses"] if s["name"] == "agent")
        return found if restarts(found) > lives and "running" in status["state"] else None

    eventually(f"{name} starts again", started, RECOVERY_SECONDS, every_seconds=0.2)
    started_at = time.monotonic()

    def recovered() -> bool:
        ready = {c["type"]: c["status"] for c in _agent(environment, name)["status"]["conditions"]}
        new = _status(environment, node)
        return (
            ready.get("Ready") == "True"
            and new["bootID"] != old["bootID"]  # before, it is the killed one's word
            and before <= _staged(new)
            and _engines_are_back(new)
        )

    eventually(f"{node} as it was", recovered, RECOVERY_SECONDS, every_seconds=0.2)
    recovered_at = time.monotonic()
    return Row(
        number,
        node,
        len(before),
        round(started_at - killed_at, 1),
        round(recovered_at - started_at, 1),
        _fetched_nbytes(_agent(environment, name)["status"]["podIP"]),
        _highest_nbytes(agent["metadata"]["uid"]),
        traffic.requests,
        len(traffic.failures),
    )


def _agent(environment: Environment, name: str) -> dict[str, Any]:
    return environment.kubectl.get("pod", name, "--namespace", SYSTEM)


def _status(environment: Environment, node: str) -> dict[str, Any]:
    body = environment.kubectl.get("nodeweights", node, "--namespace", SYSTEM)
    return dict(body.get("status", {}))


def _staged(status: dict[str, Any]) -> set[str]:
    return {one["digest"] for one in status.get("staged", []) if one["phase"] == "Staged"}


def _engines_are_back(status: dict[str, Any]) -> bool:
    engines = status.get("engines", [])
    return bool(engines) and all(engine["phase"] == "Serving" for engine in engines)


def _fetched_nbytes(address: str) -> float:
    with urllib.request.urlopen(f"http://{address}:8080/metrics", timeout=60) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    family = next(one for one in families if one.name == "hotweights_agent_fetched_bytes")
    return sum(sample.value for sample in family.samples if sample.name.endswith("_total"))


def _highest_nbytes(pod_uid: str) -> int:
    """What the kernel counted for the pod at most; 0 where it does not tell (cgroups of version 2
    do since Linux 5.19).
    """
    for root in cgroups.hierarchies():
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            for file in root.rglob(f"*{pod_uid}*/{name}"):
                return int(file.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
