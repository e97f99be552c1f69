"""SIGKILL to a container, from outside, as the kernel's out-of-memory killer would send it."""

from __future__ import annotations

from typing import Any

from e2e.harness.environment import Environment
from e2e.harness.kubectl import CommandFailed, run


def kill_container(environment: Environment, pod: dict[str, Any], container: str) -> None:
    """Kill a container's main process; the kubelet will notice and start it again."""
    if environment.cluster is None:
        raise CommandFailed(
            "killing containers needs the nodes' containerd: run the e2e without KUBECONFIG"
        )
    status = next(s for s in pod["status"]["containerStatuses"] if s["name"] == container)
    identity = status["containerID"].removeprefix("containerd://")
    node = next(n for n in environment.cluster.nodes if n.name == pod["spec"]["nodeName"])
    run(*node.ctr(), "tasks", "kill", "--signal", "SIGKILL", identity, timeout_seconds=20)
