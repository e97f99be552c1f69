"""One real vLLM per module, with a stand-in agent; checkpoints and golden tokens are made once and
kept in the cache.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import localvllm
from e2e.engine import images
from e2e.engine.agent import Agent
from e2e.engine.images import Image
from e2e.engine.launch import PROMPTS, TOKENS, VLLM
from hotweights.adapters.vllm import bundle
from hotweights_transports.handoff import frames
from localcluster import paths
from localvllm import build, models

SABOTAGE = Path(__file__).with_name("sabotage")
MAKE_SECONDS = 600.0
KIND = f"vllm {build.release()} cpu float32"
"""What engines here say that they are."""
LAST_LAYER = re.compile(r"\.(layers|h)\.1\.")  # tiny models have two


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.timeout(1800))  # the first of a module starts a vLLM


def checkpoint(arch: str, seed: int, shards: int = 1, dtype: str = "float32") -> Path:
    folder = build.cache() / "models" / f"{arch}-{seed}-{shards}-{dtype}"
    with paths.locked(
        folder.with_name(f"{folder.name}.lock"), f"writing {folder.name}", MAKE_SECONDS
    ):
        models.make_models([models.Model(folder, arch, seed, shards, dtype)])
    return folder


def delta(arch: str) -> Path:
    """Version 0 with the last layer's tensors of version 1."""
    old, new = checkpoint(arch, 0), checkpoint(arch, 1)
    folder = build.cache() / "models" / f"{arch}-delta"
    with paths.locked(
        folder.with_name(f"{folder.name}.lock"), f"writing {folder.name}", MAKE_SECONDS
    ):
        if not folder.exists():
            beside = folder.with_name(f"{folder.name}.new")
            shutil.copytree(old, beside, dirs_exist_ok=True)
            layer = [tensor for tensor in images.read(new) if LAST_LAYER.search(tensor.name)]
            assert layer, f"no layer of that name is in {new}"
            images.overwrite(beside, layer)
            beside.rename(folder)
    return folder


def golden(model: Path) -> list[dict[str, Any]]:
    """The version's probes, from a cold load (recorded once)."""
    of = "" if build.release() == build.VLLM_VERSION else f".{build.release()}"
    record = model.with_name(f"{model.name}{of}.golden.json")
    with paths.locked(
        model.with_name(f"{model.name}.lock"), f"the golden tokens of {model.name}", MAKE_SECONDS
    ):
        if not record.exists():
            paths.write_atomically(record, _cold_load(model))
    recorded: list[dict[str, Any]] = json.loads(record.read_text())
    asked = [tuple(probe["promptTokenIds"]) for probe in recorded]
    assert asked == list(PROMPTS), f"{record} is of other prompts"
    assert {len(probe["tokenIds"]) for probe in recorded} == {TOKENS}
    return recorded


def told_apart(*models: Path) -> None:
    """No prompt is answered alike by two of them: else an engine could serve either."""
    for probes in zip(*map(golden, models), strict=True):
        answers = {tuple(probe["tokenIds"]) for probe in probes}
        assert len(answers) == len(models), "whatever an engine served, it would pass"


def _cold_load(model: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:  # its own: two processes may record at a time
        return _cold_load_with(bundle.write(Path(folder) / "plugin"), model)


def _cold_load_with(plugin: Path, model: Path) -> str:
    command = [
        str(localvllm.python()),
        "-m",
        "hotweights.adapters.vllm.golden",
        str(model),
        "--dtype",
        "float32",
    ]
    command += [
        "--tokens",
        str(TOKENS),
        "--tolerance",
        "0",  # engines here run on the machine that recorded, and all tokens are wanted
        "--prompts",
        json.dumps([list(prompt) for prompt in PROMPTS]),
    ]
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_CI_ENV": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(plugin),
    }
    result = subprocess.run(
        command,
        env={**os.environ, **variables},
        cwd=model.parent,
        check=False,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise RuntimeError(result.stderr[-4000:])
    return result.stdout


class Engine:
    """A vLLM with its agent."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        boot: Image | str | None = "keep",
        arguments: Sequence[str] = (),
        ranks: int = 1,
        **environment: str,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.ranks = ranks
        self.order = folder / "sabotage"
        self.agent = Agent(folder / "agent.sock", boot)
        variables = {"HOTWEIGHTS_SABOTAGE": str(self.order), **environment}
        self.vllm = VLLM(
            model,
            folder,
            self.agent.path,
            arguments=arguments,
            environment=variables,
            extra_path=SABOTAGE,
        )

    def connected(self) -> None:
        self.agent.until(lambda: self.agent.whole(self.ranks), alive=self.vllm.alive)

    def ready(self) -> Engine:
        self.vllm.ready()
        self.connected()
        return self

    def stop(self) -> None:
        self.vllm.stop()
        self.agent.down()

    def states(self) -> list[frames.State]:
        return self.agent.peers["server"].states

    def breaks(self, step: str, deed: str) -> None:
        """What becomes of a step when it is taken next (`hotweights_sabotage_steps`)."""
        paths.write_atomically(self._order_of(step), deed)

    def broke(self, step: str) -> bool:
        """Whether the step was taken since; one that breaks always never says so."""
        return not self._order_of(step).exists()

    def lets_go(self, step: str) -> None:
        """Of a step that is held."""
        self._order_of(f"{step}.held").unlink()

    def behaves(self) -> None:
        """Nothing breaks any more."""
        for order in self.order.parent.glob(f"{self.order.name}*"):
            order.unlink(missing_ok=True)

    def _order_of(self, step: str) -> Path:
        return self.order.with_name(f"{self.order.name}.{step}")

    def takes_its_order(self, seconds: float = 60.0) -> None:
        """Until the sabotage has read what it is to do: the copy is under way."""
        self.agent.until(lambda: not self.order.exists(), seconds)

    def repaired(self, since: int, seconds: float = 120.0) -> frames.State:
        """Its word that it is repaired, once it has come; ``since`` is how many words it had said
        before it broke.
        """
        self.agent.until(
            lambda: [state.reason for state in self.states()[since:]][-1:] == ["Repaired"], seconds
        )
        said = self.states()[since:]
        assert [state.state for state in said] == ["Dirty", "Serving"], said
        return said[-1]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    """Starts engines; they end with the module, and say their last words if a test failed."""
    engines: list[Engine] = []

    def started(model: Path, *arguments: Any, **values: Any) -> Engine:
        engines.append(Engine(model, tmp_path_factory.mktemp("engine"), *arguments, **values))
        return engines[-1]

    yield started
    for engine in engines:
        print(f"--- {engine.vllm.log}\n{engine.vllm.tail()}")
        engine.stop()


@pytest.fixture(scope="module", name="models")
def llamas() -> list[Path]:
    """Two checkpoints of one model that answer differently, in other files."""
    made = [checkpoint("llama", 0, shards=3), checkpoint("llama", 1, shards=2)]
    told_apart(*made)
    return made


@pytest.fixture(scope="module")
def versions(models: list[Path]) -> Iterator[list[Image]]:
    """Their images, closed with the module."""
    made = [version(model, f"v{number}") for number, model in enumerate(models)]
    yield made
    for image in made:
        image.close()


def probes(model: Path) -> list[dict[str, Any]]:
    """What travels with a version: few tokens, because each of them is a step of the model inside
    the pause.
    """
    return [{**probe, "tokenIds": probe["tokenIds"][:8]} for probe in golden(model)[:2]]


def version(model: Path, name: str, **changes: Any) -> Image:
    """The image of a checkpoint with its golden probes."""
    return images.build(images.read(model), **{"probes": probes(model), "version": name, **changes})


def assert_serves(engine: Engine, model: Path) -> None:
    """Over HTTP, what a cold load of that checkpoint answers."""
    for probe in golden(model):
        assert (
            engine.vllm.complete(probe["promptTokenIds"], len(probe["tokenIds"]))
            == probe["tokenIds"]
        )


def report(request: pytest.FixtureRequest, text: str) -> None:
    """A figure worth reading, also when tests pass: printed at the end."""
    request.node.user_properties.append(("figure", text))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tests may have run in other processes: what they report travels with their outcome."""
    passed = [
        outcome for outcome in terminalreporter.getreports("passed") if outcome.when == "call"
    ]
    for outcome in passed:
        for name, text in outcome.user_properties:
            if name == "figure":
                terminalreporter.write_line(f"{outcome.nodeid.rpartition('::')[2]}: {text}")
