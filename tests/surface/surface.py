"""All that is promised outside, as text: commands, frames, metrics, entry points. ``python -m
tests.surface.surface`` writes it.

Somebody's script, engine, dashboard or chart relies on each of these lines. What is inside may be
moved and renamed at will; where a line of ``public.txt`` changes with it, that shows in review and
needs a word in the CHANGELOG. The custom resources have files of their own in ``crds/``, which
`make check` compares.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import typer
from prometheus_client import CollectorRegistry

from hotweights.adapters.inprocess.metrics import BinderMetrics
from hotweights.adapters.vllm import bundle
from hotweights.cli import app
from hotweights.kubectl.app import app as plugin
from hotweights.replicate.metrics import Metrics as ReplicateMetrics
from hotweights_agent.metrics import Metrics as AgentMetrics
from hotweights_agent.settings import (
    EngineSettings,
    KubeSettings,
    RootSettings,
    Settings,
    StagingSettings,
)
from hotweights_coordinator.server.metrics import Metrics as CoordinatorMetrics
from hotweights_coordinator.wire import messages
from hotweights_operator.metrics import LoopHealth
from hotweights_operator.metrics import Metrics as OperatorMetrics
from hotweights_operator.runtime.cache import Cache
from hotweights_transports.handoff import frames as handoff_frames
from hotweights_transports.peers import frames, proof

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("public.txt")


def public() -> str:
    """The text."""
    parts = {
        "commands": commands(typer.main.get_command(app), "hotweights"),
        "commands of kubectl hotweights": commands(
            typer.main.get_command(plugin), "kubectl hotweights"
        ),
        "options of the agent and the operator": modules(),
        "settings of the agent": settings(),
        "handoff frames": handoff(),
        "peer frames": peers(),
        "coordinator calls": calls(),
        "metrics": metrics(),
        "scripts": scripts(),
        "files of the plugin that vLLM finds": plugin(),
    }
    return "".join(
        f"## {title}\n" + "".join(f"{line}\n" for line in lines) for title, lines in parts.items()
    )


def commands(command: Any, path: str) -> Iterator[str]:
    """Every command with its options, and what they say of themselves."""
    yield f"{path}: {' '.join((command.help or '').split())}"
    for parameter in command.params:
        if "--help" not in parameter.opts:
            names = ", ".join([*parameter.opts, *parameter.secondary_opts])
            default = (
                ""
                if parameter.required or callable(parameter.default)
                else f" = {parameter.default}"
            )
            variable = f" [{parameter.envvar}]" if parameter.envvar else ""
            told = " ".join((getattr(parameter, "help", None) or "").split())
            yield f"  {names}{default}{variable}: {told}"
    for name, child in sorted(getattr(command, "commands", {}).items()):
        yield from commands(child, f"{path} {name}")


def modules() -> Iterator[str]:
    """What the chart starts, and with which options. The words of argparse differ between releases
    of Python.
    """
    for module in ("hotweights_agent", "hotweights_operator", "hotweights_operator.simulate"):
        command = [sys.executable, "-m", module, "--help"]
        told = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60
        ).stdout
        names = sorted(set(re.findall(r"--[a-z][a-z-]*|[A-Z]+(?:_[A-Z]+)+", told)))
        yield f"python -m {module}: {' '.join(names)}"


def settings() -> Iterator[str]:
    """What a settings file may say."""
    sections: dict[str, Any] = {"": Settings, "roots[]": RootSettings, "staging": StagingSettings}
    for section, kind in {**sections, "engines": EngineSettings, "kube": KubeSettings}.items():
        for field in fields(kind):
            default = "" if field.default is MISSING else f" = {field.default}"
            yield f"{section}.{field.name}".lstrip(".") + default


def handoff() -> Iterator[str]:
    """Between an agent and the plugin inside vLLM."""
    yield (
        f"protocols {handoff_frames.PROTOCOLS}, at most {handoff_frames.MAX_FRAME_BYTES} bytes "
        f"and {handoff_frames.MAX_FDS_PER_FRAME} descriptors"
    )
    yield from sorted(
        {handoff_frames.encode(kind()).decode() for kind in handoff_frames.Frame.__subclasses__()}
    )


def peers() -> Iterator[str]:
    """Between agents."""
    yield f"{frames.MAGIC!r} {frames.HEADER.format} protocols {frames.PROTOCOLS}"
    for kind in frames.Kind:
        yield f"{kind.name} {kind.value}, at most {frames.MAX_NBYTES[kind]} bytes"
    for encoded in (
        frames.hello("t"),
        frames.manifest_request("d"),
        frames.chunks_request("d", ["b"]),
    ):
        yield repr(encoded)
    for encoded in (frames.question("g"), frames.welcome(1), frames.refused("R", "m")):
        yield repr(encoded)
    yield repr(frames.challenge(bytes(frames.NONCE_NBYTES), "tcp://a:1"))
    yield repr(frames.proof(b"s"))
    yield f"signed by {proof.ALGORITHM!r}: {proof.LABEL!r}, the nonce, the endpoint"


def calls() -> Iterator[str]:
    """Between the coordinator and its workers."""
    for frame in messages.request_frames(1, "status", {}, "secret", None):
        yield bytes(frame).decode()
    yield messages.answer_frame(1, {}).decode()
    yield messages.error_frame(
        1, messages.CallRefused("Reason", "message", "tcp://leader")
    ).decode()
    for name, kind in messages.METHODS.items():
        schema = without_prose(kind.model_json_schema())
        yield f"{name} reads={kind.reads} binary={kind.binary} {json.dumps(schema, sort_keys=True)}"


def without_prose(schema: Any) -> Any:
    """A JSON schema without what is only for people."""
    if isinstance(schema, dict):
        return {
            key: without_prose(value)
            for key, value in schema.items()
            if key not in ("title", "description")
        }
    return schema


def metrics() -> Iterator[str]:
    """Of every process, with their labels as far as they are known before the first sample."""
    registries = (
        AgentMetrics().registry,
        OperatorMetrics(Cache(), lambda: LoopHealth(0.0, 0, 0.0, synced=True)).registry,
        CoordinatorMetrics().registry,
        ReplicateMetrics().registry,
        BinderMetrics().registry,
    )
    for registry in registries:
        for family in collected(registry):
            yield f"{family.type} {family.name}: {family.documentation}"


def collected(registry: CollectorRegistry) -> list[Any]:
    """The families of a registry, by name."""
    return sorted(registry.collect(), key=lambda family: str(family.name))


def scripts() -> Iterator[str]:
    """What is installed under a name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    yield from project["scripts"]
    for extra in sorted(project["optional-dependencies"]):
        yield f"hotweights[{extra}]"


def plugin() -> Iterator[str]:
    """Its entry points."""
    contents = bundle.contents()
    for name in sorted(contents):
        if name.endswith("entry_points.txt"):
            yield from contents[name].splitlines()


if __name__ == "__main__":
    FILE.write_text(public())
