"""Swaps one after the other in one engine, under load, and what has to hold meanwhile.

Beside the clients, who only have to be answered, a judge asks: which version does the engine say
that it serves, what does it answer, and which one does it say now? Where both words are of the same
version, and no swap was begun between them, the answer must be what a cold load of that version
gave. The next swap waits for at least one such answer, so that each version was judged.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http.client import HTTPException
from typing import Any

from e2e.engine.conftest import Engine
from e2e.engine.images import Image
from e2e.engine.launch import VLLM
from e2e.harness.traffic import Traffic
from e2e.soak.footprint import Footprint, growth, processes

SETTLED = 10  # swaps, after which everything is to be flat
WINDOW = 10  # swaps at most whose least is taken, after those and at the end
CACHE = ("--num-gpu-blocks-override", "32")
"""Arguments of the engine: its cache of keys and values is memory that is there once it was used, a
GiB of it otherwise. So much is used by the tenth swap.
"""
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
"""Environment of the engine. The first gives it a word of its own for what it serves. The second is
for CPUs: oneDNN keeps what it compiled for each number of tokens in a step, for 1024 of them, some
70 kB or more each. Requests that run over a swap are computed anew from wherever they were, so each
swap under load brings numbers that were not there before, until the cache is full. Without it
a worker's memory tells what the swaps themselves leave.
"""
ANSWER_SECONDS = 300.0  # a machine that others use too, and a swap meanwhile

Probes = Sequence[Mapping[str, Any]]
"""Prompts and what a cold load answers: ``promptTokenIds``, ``tokenIds``."""


@dataclass(frozen=True, slots=True)
class Row:
    """One swap."""

    swap: int
    digest: str
    seconds: float  # preparing and committing it
    pause_seconds: float
    footprints: dict[str, Footprint]  # by process, once the swap was tidied up after


@dataclass(slots=True)
class Account:
    """What came of all."""

    rows: list[Row] = field(default_factory=list)
    requests: int = 0  # that ended, the judge's too
    failures: list[str] = field(default_factory=list)
    judged: dict[str, int] = field(default_factory=dict)  # answers, by digest
    false: list[str] = field(default_factory=list)

    def windows(self, process: str) -> tuple[list[Footprint], list[Footprint]]:
        """Of one process: what it held when it had settled, and at the end. Empty where there were
        too few swaps to say.
        """
        held = [row.footprints[process] for row in self.rows]
        size = min(WINDOW, (len(held) - SETTLED) // 2)
        return (held[SETTLED:][:size], held[-size:]) if size > 0 else ([], [])

    def problems(self) -> list[str]:
        """What is not as it is to be."""
        found = [f"a request failed: {failure}" for failure in self.failures]
        found += self.false
        for digest in {row.digest for row in self.rows} - self.judged.keys():
            found.append(f"no answer of {digest} was judged")
        for process in self.rows[0].footprints if self.rows else ():
            before, after = self.windows(process)
            if before:
                found += [f"{process}: {what}" for what in growth(before, after)]
        return found

    def to_json(self) -> dict[str, Any]:
        """All of it, and what is wrong with it."""
        return {**asdict(self), "problems": self.problems()}


class Judge:
    """Holds answers against the engine's word, on a thread of its own."""

    def __init__(self, vllm: VLLM, cold: Mapping[str, Probes], account: Account) -> None:
        """``cold``: of each digest, what is asked and has to come. A word that is none of them, as
        of what was booted, is not judged.
        """
        self._vllm, self._cold, self._account = vllm, cold, account
        self._turn = 0
        self._judged_in_turn = 0
        self._changed = threading.Condition()

    def begin_turn(self) -> None:
        """Before a swap is begun: answers that are under way are of neither version for sure."""
        with self._changed:
            self._turn += 1

    def count_anew(self) -> None:
        """After a swap: `until_judged` waits for answers from here on."""
        with self._changed:
            self._judged_in_turn = 0

    def until_judged(self) -> None:
        """Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._judged_in_turn, 2 * ANSWER_SECONDS):
                raise TimeoutError(f"no answer was judged within {2 * ANSWER_SECONDS:g} s")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """It asks from entry to exit. Raises TimeoutError where its last question has no end."""
        stop = threading.Event()
        thread = threading.Thread(target=self._run, args=(stop,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(2 * ANSWER_SECONDS)
        if thread.is_alive():
            raise TimeoutError("the judge's last question has no end")

    def _run(self, stop: threading.Event) -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            failure = ""
            try:
                self._ask(number)
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                failure = f"{type(error).__name__}: {error}"
            with self._changed:
                self._account.requests += 1
                if failure:
                    self._account.failures.append(failure)
            if failure:
                stop.wait(0.2)  # a dead engine must not turn into a busy loop

    def _ask(self, number: int) -> None:
        turn, digest = self._turn, self._word()
        probes = self._cold.get(digest)
        if probes is None:
            time.sleep(0.2)  # until the first swap gives it a name
            return
        probe = probes[number % len(probes)]
        expected = list(probe["tokenIds"])
        answer = self._vllm.complete(probe["promptTokenIds"], len(expected), ANSWER_SECONDS)
        again = self._word()
        with self._changed:
            if (self._turn, again) != (turn, digest):
                return
            self._account.judged[digest] = self._account.judged.get(digest, 0) + 1
            self._judged_in_turn += 1
            if answer != expected:
                self._account.false.append(f"{digest} is named, and the answer is {answer}")
            self._changed.notify_all()

    def _word(self) -> str:
        """The digest that the engine says that it serves."""
        url = f"{self._vllm.url}/weight_info"
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
            return str(json.loads(answer.read())["weight_version"])


def play(
    engine: Engine,
    versions: Sequence[tuple[Image, Probes]],
    swaps: int,
    tell: Callable[[Row], None] = lambda row: None,
    account: Account | None = None,
) -> Account:
    """So many swaps, to each version by turns, from the first on. The engine was started with
    `CACHE` and `ENVIRONMENT`; it serves another version than the first. ``account`` is filled
    meanwhile, for whoever is interrupted.
    """
    account = Account() if account is None else account
    judge = Judge(engine.vllm, {image.digest: probes for image, probes in versions}, account)
    traffic = Traffic([engine.vllm.address], plain=1, streams=2, max_tokens=40)
    turns = zip(range(1, swaps + 1), itertools.cycle(versions), strict=False)
    try:
        with traffic, judge.watching():
            for swap, (image, _) in turns:
                judge.begin_turn()
                began = time.monotonic()
                answer = engine.agent.swap(image)
                seconds = time.monotonic() - began
                judge.count_anew()
                # answered on the thread that tidies up after a commit, so when that is done
                engine.agent.release("sha256:unheard-of")
                judge.until_judged()
                row = Row(swap, image.digest, seconds, answer.pause_seconds, _held(engine))
                account.rows.append(row)
                tell(row)
    finally:
        account.requests += traffic.requests
        account.failures += traffic.failures
    return account


def _held(engine: Engine) -> dict[str, Footprint]:
    return {name: Footprint.of(pid) for name, pid in processes(engine.vllm).items()}
