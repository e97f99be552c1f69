"""The tour itself: the commands that a person would type, one after the other, and what is looked
at in between.

Whatever it runs, it shows first, word for word: each is a line for a shell in the tour's folder,
with the variables that are shown at the beginning. It reads answers from vLLM's port and pauses from
the worker's metrics, so it says nothing that somebody else could not look up.
"""

from __future__ import annotations

import json
import os
import shlex
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from e2e.harness.docs import ROOT
from e2e.harness.story import say, step
from e2e.harness.traffic import Traffic, complete_ids
from e2e.tour import install
from e2e.tour.account import Answers, Clients, Evidence, Switch, metric
from e2e.tour.machine import HOST, SOCKET, Ports
from e2e.tour.processes import Failed, Processes
from localvllm import build

START_SECONDS = 600.0  # of a vLLM, and of whatever imports torch
COMMAND_SECONDS = 300.0  # on a machine that others use too
POLL_SECONDS = 0.2
TELL_SECONDS = 10.0  # between two signs of life
TRAFFIC_SECONDS = 2.0  # of requests before anything changes, and after
TOKENS = 24  # for each prompt, where no near tie ends them
MODELS = {"v0": "llama-0", "v1": "llama-1"}  # the folders that localvllm writes
WHAT_IS_INSTALLED = {
    install.HOTWEIGHTS: "Hotweights into .venv",
    install.VLLM: f"vLLM {build.VLLM_VERSION} for CPUs into {build.cache()} (3 GB to fetch)",
}
VARIABLES: Mapping[str, str] = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB; by default vLLM takes nearly all memory
    "VLLM_CPU_CI_ENV": "1",
    "OMP_NUM_THREADS": "1",  # threads of two vLLMs would wait for each other's on few cores
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(slots=True)
class Tour:
    """One tour, from an empty folder to its evidence."""

    folder: Path
    ports: Ports
    processes: Processes

    @property
    def address(self) -> str:
        """Where vLLM answers."""
        return f"{HOST}:{self.ports.vllm}"

    @property
    def endpoint(self) -> str:
        """Where the coordinator answers."""
        return f"tcp://{HOST}:{self.ports.coordinator}"

    def play(self) -> Evidence:
        """Everything. Raises `Failed` where a step did not come about."""
        self._install()
        self._show_environment()
        with self._step("two checkpoints of a tiny Llama, 5 MB each: v0 and v1"):
            self._run(
                "models", "python -m localvllm models . --arch llama --seeds 2", START_SECONDS
            )
            self._run("plugin", "python -m hotweights.adapters.vllm.bundle plugin")
        with self._step("a coordinator, and the worker of this host"):
            self._start_control()
        say("==> vLLM on v0; it starts in the background")
        self._start_vllm()
        with self._step("both published as versions, while it starts"):
            self._publish()
        with self._step(
            "a second vLLM, started cold on v1: what it answers the first one will have to answer",
            lambda: self.processes.now("cold"),
        ):
            cold, prompts = self._cold()
        with self._step("the first vLLM opens its port", lambda: self.processes.now("vllm")):
            self._until("vLLM", self._is_healthy)
        before = self._ask(prompts)
        say(f"    v0 answers {_shown(before)}")
        say(f"    v1 has to  {_shown(cold)}")
        processes = frozenset(self.processes.members("vllm"))
        with Traffic([self.address], plain=1, streams=1) as traffic:
            time.sleep(TRAFFIC_SECONDS)
            forth = self._switch("v1", "", prompts, traffic)
            back = self._switch("v0", "v1", prompts, traffic)
            time.sleep(TRAFFIC_SECONDS)
        return Evidence(
            before=before,
            cold=cold,
            forth=forth,
            back=back,
            clients=_clients(traffic),
            processes_before=processes,
            processes_after=frozenset(self.processes.members("vllm")),
            staged_nbytes=int(self._staged_nbytes()),
        )

    def _install(self) -> None:
        commands = install.missing()
        if not commands:
            return
        with self._step(
            f"installing {' and '.join(WHAT_IS_INSTALLED[name] for name in commands)}",
            lambda: install.progress(self.processes),
        ):
            for command in commands.values():
                say(f"    $ {command}")
            install.install(self.processes, commands)

    def _show_environment(self) -> None:
        variables = {
            "PATH": f"{ROOT / '.venv' / 'bin'}:$PATH",
            build.PYTHON_VARIABLE: str(install.vllm_python()),
            **VARIABLES,
        }
        say("==> all that follows is typed in this folder, with these variables")
        say(f"    $ cd {shlex.quote(str(self.folder))}")
        for name, value in variables.items():
            say(f"    $ export {name}={value}")
            self.processes.environment[name] = os.path.expandvars(value)

    def _start_control(self) -> None:
        self._start(
            "coordinator",
            f"hotweights coord-serve --endpoint {self.endpoint} "
            f"--metrics-port {self.ports.coordinator_metrics}",
        )
        self._start(
            "worker",
            f"hotweights worker --endpoint {self.endpoint} --root . --socket-folder {SOCKET.parent} "
            f"--metrics-port {self.ports.worker_metrics}",
        )
        self._until("the worker's socket", (self.folder / SOCKET).exists)

    def _start_vllm(self) -> None:
        self._start(
            "vllm",
            f"HOTWEIGHTS_SOCKET=$PWD/{SOCKET} HOTWEIGHTS_TOKEN_FILE=$PWD/{SOCKET.parent}/engine.token "
            f"PYTHONPATH=plugin ${build.PYTHON_VARIABLE} "
            f"-m vllm.entrypoints.openai.api_server --model {MODELS['v0']} --served-model-name tiny "
            f"--dtype float32 --max-model-len 256 --host {HOST} --port {self.ports.vllm}",
        )

    def _cold(self) -> tuple[Answers, Answers]:
        """What a cold vLLM answers on v1, and to which prompts."""
        self._run(
            "cold",
            f"PYTHONPATH=plugin ${build.PYTHON_VARIABLE} "
            f"-m hotweights.adapters.vllm.golden {MODELS['v1']} --dtype float32 --tokens {TOKENS} "
            "> cold.json",
            START_SECONDS,
        )
        probes = json.loads((self.folder / "cold.json").read_text())
        return (
            [probe["tokenIds"] for probe in probes],
            [probe["promptTokenIds"] for probe in probes],
        )

    def _publish(self) -> None:
        for version, model in MODELS.items():
            self._run(
                "publish",
                f"hotweights publish --checkpoint {model} --model tiny --version {version} "
                f"--output {version}.json",
            )

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, HTTPException):
            return False

    def _switch(self, version: str, serves: str, prompts: Answers, traffic: Traffic) -> Switch:
        """To a version, from what it ``serves``; empty: what it booted with."""
        what = "back to v0, the same way" if version == "v0" else f"{version}, under these requests"
        with self._step(what):
            prev = f"--prev {serves}.json " if serves else ""
            self._run(
                "plan",
                f"hotweights plan {prev}--next {version}.json --bucket-mb 64 "
                f"--output plan-{version}.json",
            )
            self._run(
                "submit",
                f"hotweights coord-submit-plan --endpoint {self.endpoint} "
                f"--plan plan-{version}.json",
            )
            count, pause = self._pauses()
            began = time.monotonic()
            self._run(
                "begin",
                f"hotweights begin --endpoint {self.endpoint} --version {version} "
                "--commit-when-ready --wait",
            )
            seconds = time.monotonic() - began
            count_after, pause_after = self._pauses()
            answers = self._ask(prompts)
        switch = Switch(version, seconds, int(count_after - count), pause_after - pause, answers)
        say(f"    vLLM stood still for {switch.pause_seconds * 1000:.0f} ms")
        say(f"    it answers {_shown(answers)}")
        say(f"    clients: {_clients(traffic)}")
        return switch

    def _ask(self, prompts: Answers) -> Answers:
        try:
            return [complete_ids(self.address, prompt, TOKENS) for prompt in prompts]
        except (OSError, HTTPException, ValueError, LookupError) as error:
            raise Failed(
                f"vLLM did not answer: {error} (its log: {self.processes.log('vllm')})"
            ) from error

    def _pauses(self) -> tuple[float, float]:
        """How many commits the worker counted, and for how many seconds they paused."""
        text, name = self._metrics(), "hotweights_agent_pause_seconds"
        return metric(text, f"{name}_count"), metric(text, f"{name}_sum")

    def _staged_nbytes(self) -> float:
        text, name = self._metrics(), "hotweights_agent_capacity_bytes"
        return metric(text, name, {"kind": "memory"}) - metric(text, name, {"kind": "free"})

    def _metrics(self) -> str:
        url = f"http://{HOST}:{self.ports.worker_metrics}/metrics"
        with urllib.request.urlopen(url, timeout=COMMAND_SECONDS) as answer:
            return bytes(answer.read()).decode()

    def _start(self, name: str, command: str) -> None:
        say(f"    $ {command} > {self.processes.log(name).name} 2>&1 &")
        self.processes.start(name, command)

    def _run(self, name: str, command: str, seconds: float = COMMAND_SECONDS) -> None:
        say(f"    $ {command}")
        self.processes.start(name, command)
        self.processes.wait(name, seconds)

    def _until(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            self.processes.check()
            if time.monotonic() > deadline:
                raise Failed(f"{what} is not there after {START_SECONDS:g} s: see {self.folder}")
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _step(self, what: str, detail: Callable[[], str] | None = None) -> Iterator[None]:
        with step(what, detail, TELL_SECONDS):
            yield


def _clients(traffic: Traffic) -> Clients:
    return Clients(
        traffic.requests,
        tuple(traffic.failures),
        traffic.slowest_seconds,
        traffic.worst_gap(),
    )


def _shown(answers: Answers) -> str:
    """The beginning of the first one."""
    return f"{list(answers[0][:8])} …" if answers else "nothing"
