"""The operator's settings, read once at the edge: from the command line, else from the environment,
else the default.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

AGENT_SELECTOR = "app.kubernetes.io/name=hotweights,app.kubernetes.io/component=agent"


@dataclass(frozen=True, slots=True)
class Settings:
    """How this operator runs. From ``pace_seconds`` on nothing reads them from outside: tests set
    them.
    """

    namespace: str
    """The installation's namespace, where NodeWeights and the agents' pods are."""
    watched: tuple[str, ...]
    """Namespaces whose rollouts are served; empty: all."""
    agent_selector: str
    """Labels of the agents' pods, as a label selector is written: ``key=value,…``."""
    instance: str
    """Name of this pod, for events."""
    metrics_port: int
    """Serves /metrics; 0: not at all."""
    health_port: int
    """Serves /healthz and /readyz; 0: not at all."""
    log_level: str
    """From which level on lines are written: debug, info, warning or error."""
    pace_seconds: float = 0.2
    """The same rollout, version or node is decided at most this often; what happens in between is
    seen together.
    """
    workers: int = 4
    """Decisions under way at a time; they mostly wait for the API server."""
    writes: int = 32
    """Writes to the API server at a time."""
    relist_seconds: float = 60.0
    """How often WeightRollouts and WeightVersions are listed: kopf does not say what vanished
    unseen, nor that it hears.
    """
    resync_seconds: float = 600.0
    """How often everything is decided anew, should a wake-up have been lost."""
    stuck_seconds: float = 120.0
    """/healthz fails when a decision has been waiting for so long."""
    stale_seconds: float = 150.0
    """/readyz fails when nothing was heard of some kind for so long: bookmarks come every minute,
    lists too.
    """


def parse(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> Settings:
    """From the command line and the environment. Raises SystemExit for arguments that are none,
    ValueError for a port in the environment that is no number.
    """
    parser = argparse.ArgumentParser(
        prog="python -m hotweights_operator",
        description="Puts new versions of weights into running vLLM pods, as WeightRollouts say. "
        "It takes KUBECONFIG, or the service account of the pod that it runs in.",
        epilog="What a rollout would do can be seen beforehand: python -m "
        "hotweights_operator.simulate plan -f rollout.yaml",
    )
    env = environment.get
    parser.add_argument(
        "--namespace",
        default=env("POD_NAMESPACE", "hotweights-system"),
        help="the installation's namespace, where NodeWeights and agents are (POD_NAMESPACE; "
        "default: %(default)s)",
    )
    parser.add_argument(
        "--watch-namespace",
        action="append",
        default=[n for n in env("HOTWEIGHTS_WATCH_NAMESPACES", "").split(",") if n],
        metavar="NAMESPACE",
        help="serve rollouts of this namespace only; may be repeated (HOTWEIGHTS_WATCH_NAMESPACES; "
        "default: all)",
    )
    parser.add_argument(
        "--agent-selector",
        default=env("HOTWEIGHTS_AGENT_SELECTOR", AGENT_SELECTOR),
        help="labels of the agents' pods (default: %(default)s)",
    )
    parser.add_argument(
        "--metrics-port",
        type=int,
        default=int(env("HOTWEIGHTS_METRICS_PORT", "8080")),
        help="0: no metrics (%(default)s)",
    )
    parser.add_argument(
        "--health-port",
        type=int,
        default=int(env("HOTWEIGHTS_HEALTH_PORT", "8081")),
        help="0: none (%(default)s)",
    )
    levels = ("debug", "info", "warning", "error")
    parser.add_argument(
        "--log-level",
        choices=levels,
        default=env("HOTWEIGHTS_LOG_LEVEL", "info"),
        help="%(choices)s (%(default)s)",
    )
    read = parser.parse_args(arguments)
    return Settings(
        namespace=read.namespace,
        # once each, in their order: the option adds to what the environment names
        watched=tuple(dict.fromkeys(read.watch_namespace)),
        agent_selector=read.agent_selector,
        instance=env("POD_NAME", "hotweights-operator"),
        metrics_port=read.metrics_port,
        health_port=read.health_port,
        log_level=read.log_level,
    )
