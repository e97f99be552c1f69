"""One architecture: an engine is switched there and back, by each way, and must answer each time
what a cold load of that version does.

A refusal is a result, as long as it is said before anything was touched: then the engine answers
as before. Where a way is refused the switch is made by the way that the rank itself chooses, so
that the rest is tried.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from e2e.engine import images
from e2e.engine.agent import Gone
from e2e.engine.conftest import Engine
from e2e.engine.images import Image
from e2e.engine.launch import Ended
from e2e.zoo import checkpoints
from e2e.zoo.architectures import Architecture
from e2e.zoo.cold import Probes, golden, told_apart
from e2e.zoo.forks import Forks, Unanswered
from e2e.zoo.row import EQUAL, FAILED, REFUSED, STEPS, Row, Switch
from e2e.zoo.tensors import smallest_part
from hotweights_transports.handoff import frames
from localcluster import ClusterError
from localvllm.build import BuildError

PROBE_TOKENS = 8  # each is a step of the model inside the pause
SECONDS = 1800.0  # for what takes seconds on a machine that does nothing else


class Broken(Exception):
    """A switch went wrong, or a refusal did not leave what was served."""


def play(architecture: Architecture, cold: Forks, folder: Path) -> Row:
    """``cold`` runs `inside.cold`, ``folder`` gets the engine's log. What goes wrong is in the row."""
    row, began = Row(architecture.name, architecture.kind), time.monotonic()
    try:
        if architecture.refused:
            _refuse(architecture, folder, row)
        else:
            _switch(architecture, cold, folder, row)
    except (BuildError, Unanswered) as error:
        row.not_run = str(error)
    except (Broken, Ended, Gone, ClusterError, OSError) as error:
        row.failed = f"{type(error).__name__}: {error}"
    row.seconds = round(time.monotonic() - began, 1)
    return row


def _refuse(architecture: Architecture, folder: Path, row: Row) -> None:
    """It serves, and says at once that it cannot be updated."""
    engine = _start(architecture, checkpoints.version(architecture, 0), folder)
    try:
        engine.vllm.ready(SECONDS)
        engine.agent.until(lambda: "server" in engine.agent.peers, SECONDS, engine.vllm.alive)
        row.refused = engine.agent.peers["server"].hello.unsupported
        if architecture.refused not in row.refused:
            raise Broken(f"it was to be refused, and said {row.refused!r}")
    finally:
        engine.stop()


def _switch(architecture: Architecture, cold: Forks, folder: Path, row: Row) -> None:
    models = checkpoints.versions(architecture)
    recorded = {name: golden(cold, model) for name, model in models.items()}
    prompts = told_apart([*recorded.values()])
    truth = {name: _asked(probes, prompts) for name, probes in recorded.items()}
    engine = _start(architecture, models["v0"], folder)
    try:
        engine.vllm.ready(SECONDS)
        engine.agent.until(engine.agent.whole, SECONDS, engine.vllm.alive)
        _compare(engine, truth["v0"])
        versions = {name: _image(model, name, truth[name]) for name, model in models.items()}
        serves = "v0"
        for name, wished in STEPS:
            for wish in (wished, "Auto"):
                switch = Switch(name, wish)
                row.switches.append(switch)
                _try(engine, versions[name], switch)
                serves = serves if switch.result == REFUSED else name
                _compare(engine, truth[serves], switch)
                if switch.result != REFUSED:
                    break
            else:
                raise Broken(f"{name} is refused by every way: {switch.message}")
        for image in versions.values():
            image.close()
    finally:
        engine.stop()
        row.part = smallest_part(engine.vllm.log.read_text(errors="replace"))


def _start(architecture: Architecture, model: Path, folder: Path) -> Engine:
    return Engine(model, folder, arguments=architecture.arguments)


def _image(model: Path, name: str, truth: Probes) -> Image:
    probes = [{**probe, "tokenIds": probe["tokenIds"][:PROBE_TOKENS]} for probe in truth]
    return images.build(images.read(model), probes, name)


def _asked(probes: Probes, prompts: list[list[int]]) -> Probes:
    return [probe for probe in probes if probe["promptTokenIds"] in prompts]


def _try(engine: Engine, image: Image, switch: Switch) -> None:
    """Raises `Broken` where it is neither made nor refused."""
    wish = {"memory": switch.wished, "max_pause_seconds": SECONDS}
    (prepared,) = engine.agent.prepare(image, SECONDS, **wish)
    if isinstance(prepared, frames.Rejected):
        switch.result = REFUSED
        switch.message = f"{prepared.reason}: {prepared.message}"
        return
    if not isinstance(prepared, frames.Prepared):
        raise Broken(f"prepare was answered with {prepared}")
    switch.way, switch.result = prepared.way, FAILED  # until it is known to be otherwise
    frame = engine.agent.start_commit(image.digest, deadline_seconds=SECONDS)
    answer = engine.agent.answer_of(frame, SECONDS)
    if not isinstance(answer, frames.Committed):
        switch.message = getattr(answer, "message", str(answer))
        raise Broken(f"{switch.version} by {switch.way}: {switch.message}")
    switch.pause_seconds = answer.pause_seconds
    if answer.probe != "Golden":
        raise Broken(f"{switch.version} was committed without its golden tokens: {answer.probe}")


def _compare(engine: Engine, truth: Probes, switch: Switch | None = None) -> None:
    """Over HTTP, token by token. Raises `Broken`."""
    for expected, answered in _answers(engine, truth):
        if expected != answered:
            who = "the engine as it booted" if switch is None else f"{switch}"
            raise Broken(f"{who} answers {answered}, a cold load {expected}")
    if switch is not None and switch.result != REFUSED:
        switch.result = EQUAL


def _answers(engine: Engine, truth: Probes) -> Iterator[tuple[list[int], list[int]]]:
    for probe in truth:
        expected: list[int] = probe["tokenIds"]
        yield expected, engine.vllm.complete(probe["promptTokenIds"], len(expected), SECONDS)
