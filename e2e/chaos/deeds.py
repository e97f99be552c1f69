"""Rounds as they are carried out on a cluster of this machine.

Whatever is begun here ends with its context, also when somebody interrupts it: a container that was
stopped goes on, the API server comes back, a cable is plugged in, a disk has room.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from e2e.chaos.rounds import Change, Fault, Round, other
from e2e.harness import samples
from e2e.harness.environment import SYSTEM, Environment
from e2e.harness.fleet import restarts
from e2e.harness.kubectl import CommandFailed, eventually, run
from e2e.harness.sabotage import kill_container
from localcluster import Cluster

NAME = "tiny-llama"
SELECTOR = f"app={NAME}"
STATE_FOLDER = "/var/lib/hotweights"
PATIENCE_SECONDS = 180.0

Seen = Callable[[], bool]
"""Whether the cluster has noticed what was done: before, what it says is of the time before."""


def ours(environment: Environment) -> Cluster:
    """The cluster. Raises `CommandFailed` where it is somebody else's."""
    if environment.cluster is None:
        raise CommandFailed(
            "somebody else's nodes and API server are not ours to break: run it without KUBECONFIG"
        )
    return environment.cluster


# -- what somebody wants ------------------------------------------------------------------------


def change(environment: Environment, planned: Round) -> None:
    """Ask for it, as often as it takes until the API server has heard it all."""

    def asked() -> bool:
        _change(environment, planned)
        return True

    eventually(f"{planned.change} is asked for", asked, PATIENCE_SECONDS)


def _change(environment: Environment, planned: Round) -> None:
    kubectl = environment.in_samples
    if planned.change is Change.FLAP:
        lead_to(environment, other(planned.version))
    if planned.change in (Change.FLAP, Change.FLIP):
        lead_to(environment, planned.version)
    elif planned.change is Change.SCALE:
        kubectl("scale", f"deployment/{NAME}", f"--replicas={planned.replicas}")
    else:
        pods = kubectl.pods(SELECTOR)
        gone = pods[planned.victim % len(pods)]["metadata"]["name"]
        kubectl("delete", "pod", gone, "--wait=false")


def lead_to(environment: Environment, version: str) -> None:
    """Set ``versionRef`` and nothing else."""
    patch = json.dumps({"spec": {"versionRef": {"name": f"{NAME}-{version}"}}})
    environment.in_samples("patch", "weightrollout", NAME, "--type=merge", "--patch", patch)


# -- what goes wrong ----------------------------------------------------------------------------


@contextmanager
def fault(environment: Environment, planned: Round) -> Iterator[Seen]:
    """It has begun inside the context, and is over after it. What was killed comes back when it
    comes back.
    """
    kind = planned.fault
    if kind in _SIGNALS:
        component, signal = _SIGNALS[kind]
        with _signalled(environment, component, planned.victim, signal) as seen:
            yield seen
        return
    cluster = ours(environment)
    node = cluster.nodes[planned.victim % len(cluster.nodes)]
    begin: Callable[[], None]
    end: Callable[[], None]
    if kind is Fault.CUT_API_SERVER:
        begin, end = cluster.control_plane.stop_apiserver, cluster.control_plane.start_apiserver
    elif kind is Fault.CUT_NODE:
        begin, end = node.unplug, node.plug
    else:
        begin, end = partial(_fill, node.enter()), partial(_empty, node.enter())
    try:
        begin()
        yield lambda: True
    finally:
        end()


_SIGNALS = {
    Fault.KILL_OPERATOR: ("operator", "SIGKILL"),
    Fault.STOP_OPERATOR: ("operator", "SIGSTOP"),
    Fault.KILL_AGENT: ("agent", "SIGKILL"),
    Fault.STOP_AGENT: ("agent", "SIGSTOP"),
    Fault.RESTART_AGENT: ("agent", "SIGTERM"),
    Fault.KILL_ENGINE: ("vllm", "SIGKILL"),
    Fault.STOP_ENGINE: ("vllm", "SIGSTOP"),
}
"""Containers that get a signal: which, and which signal."""


@contextmanager
def _signalled(
    environment: Environment, container: str, victim: int, signal: str
) -> Iterator[Seen]:
    def running() -> list[dict[str, Any]]:
        found = _pods(environment, container)
        return [pod for pod in found if _state(pod) == "running"]

    pods = eventually(f"a running {container}", running, PATIENCE_SECONDS)
    pod = pods[victim % len(pods)]
    lives = restarts(pod)
    kill_container(environment, pod, container, signal)

    def is_another() -> bool:
        uid = pod["metadata"]["uid"]
        now = [p for p in _pods(environment, container) if p["metadata"]["uid"] == uid]
        return all(restarts(p) > lives for p in now)

    if signal != "SIGSTOP":
        yield is_another
        return
    try:
        yield lambda: True
    finally:
        # where its kubelet has lost patience there is nobody left to go on
        with suppress(CommandFailed):
            kill_container(environment, pod, container, "SIGCONT")


def _pods(environment: Environment, container: str) -> list[dict[str, Any]]:
    if container == "vllm":
        return environment.in_samples.pods(SELECTOR)
    return samples.system_pods(environment, container)


def _state(pod: dict[str, Any]) -> str:
    statuses = pod.get("status", {}).get("containerStatuses", [])
    return next(iter(statuses[0]["state"]), "") if statuses else ""


# -- a disk that can be full --------------------------------------------------------------------


def make_small_disks(environment: Environment) -> None:
    """Each node's state folder on a file system of its own, with what is in it, and agents that
    look at it. It goes with the node.
    """
    made = [node for node in ours(environment).nodes if _made_small(node.enter())]
    if not made:
        return
    kubectl, agents = environment.kubectl, "app.kubernetes.io/component=agent"
    where = ("daemonset", "--namespace", SYSTEM, "--selector", agents)
    kubectl("rollout", "restart", *where)
    kubectl("rollout", "status", *where, "--timeout=300s", timeout_seconds=310)


def _made_small(enter: list[str]) -> bool:
    if run(*enter, "stat", "--file-system", "--format=%T", STATE_FOLDER).strip() == "tmpfs":
        return False
    aside = "/run/hotweights-chaos"
    run(*enter, "cp", "--archive", STATE_FOLDER, aside)
    run(*enter, "mount", "-t", "tmpfs", "-o", "mode=755,size=1m", "tmpfs", STATE_FOLDER)
    run(*enter, "cp", "--archive", f"{aside}/.", STATE_FOLDER)
    run(*enter, "rm", "--recursive", aside)
    return True


def _fill(enter: list[str]) -> None:
    """Until nothing more goes in. Raises `CommandFailed` where something still does."""
    with suppress(CommandFailed):  # it ends for want of room
        run(*enter, "dd", "if=/dev/zero", f"of={STATE_FOLDER}/full", "bs=4096", "count=4096")
    left = run(*enter, "stat", "--file-system", "--format=%a", STATE_FOLDER).strip()
    if left != "0":
        raise CommandFailed(f"{STATE_FOLDER} was to be full and has {left} blocks left")


def _empty(enter: list[str]) -> None:
    run(*enter, "rm", "--force", f"{STATE_FOLDER}/full")
