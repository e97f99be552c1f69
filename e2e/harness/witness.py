"""Who looks whether what is said is true: labels by asking the engines, statuses by what was said
before.

A witness that could not look has not seen that all is well. So it counts what it compared, an error
of its own is an error, and an engine that did not answer is excused only by a container that was
started anew, a pod that is gone, or a test that had cut it off.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

from e2e.harness.environment import Environment
from e2e.harness.fleet import is_ready
from e2e.harness.kubectl import CommandFailed, TimedOut, eventually
from e2e.harness.reach import reach
from e2e.harness.tape import Body, Tape
from e2e.harness.traffic import complete_ids

EVERY_SECONDS = 1.0
ANSWER_SECONDS = 90.0  # longer than any pause
EXCUSED_SECONDS = 60.0  # a kubelet may be late to say that a container ended
LABEL = "hotweights.dev/version"


@dataclass(frozen=True, slots=True)
class Shown:
    """A pod that is Ready and says what it serves."""

    name: str
    uid: str
    life: str  # the container's id
    version: str
    written: str  # the resourceVersion: what was changed and changed back is not the same
    body: Body = field(compare=False)


@dataclass
class Account:
    """What a witness saw."""

    # statements that were compared, by version
    compared: Counter[str] = field(default_factory=Counter)
    lies: list[str] = field(default_factory=list)
    # (uid, life) → what happened
    unanswered: dict[tuple[str, str], str] = field(default_factory=dict)


@contextmanager
def watch_labels(
    environment: Environment,
    selector: str,
    cold: Mapping[str, list[int]],
    prompt: Sequence[int],
    tokens: int,
    was_cut_off: Callable[[float], bool] = lambda since: False,
) -> Iterator[Account]:
    """Label, answer, label: a pod counts where nobody wrote to it from before the answer until
    after it. Raises whatever kept it from looking, unless that was the test's own doing:
    ``was_cut_off`` says whether the API server or a pod was out of reach at any moment since then
    (monotonic seconds).
    """
    account = Account()
    stop = threading.Event()

    def ask(shown: Shown) -> list[int] | str:
        try:
            with reach(environment, [shown.body], 8000) as (address,):
                return complete_ids(address, prompt, tokens, timeout_seconds=ANSWER_SECONDS)
        except HTTPError as error:
            with error:  # it holds the connection
                return str(error)
        except (OSError, HTTPException, ValueError, KeyError) as error:
            return f"{type(error).__name__}: {error}"

    def try_to_look(pool: ThreadPoolExecutor) -> None:
        began = time.monotonic()
        try:
            look(pool, began)
        except (CommandFailed, TimedOut):
            if not was_cut_off(began):
                raise

    def look(pool: ThreadPoolExecutor, began: float) -> None:
        before = _shown(environment, selector)
        answers = list(pool.map(ask, before))
        after = {shown.uid: shown for shown in _shown(environment, selector)}
        for shown, answer in zip(before, answers, strict=True):
            if isinstance(answer, str):
                # that it stopped to be Ready meanwhile is no excuse: it was when it was asked
                if not was_cut_off(began):
                    account.unanswered[shown.uid, shown.life] = f"{shown.name}: {answer}"
                continue
            if after.get(shown.uid) != shown:
                continue
            account.compared[shown.version] += 1
            if answer != cold.get(shown.version):
                others = [version for version, ids in cold.items() if ids == answer]
                account.lies.append(
                    f"{shown.name} is labelled {shown.version} and answers as {others or answer}"
                )

    def run(pool: ThreadPoolExecutor) -> None:
        while not stop.wait(EVERY_SECONDS):
            try_to_look(pool)

    with ThreadPoolExecutor(8) as pool:
        running = pool.submit(run, pool)
        try:
            yield account
        finally:
            stop.set()
            running.result(ANSWER_SECONDS + 60)
            account.lies += _unexcused(environment, selector, account)


def _shown(environment: Environment, selector: str) -> list[Shown]:
    found = []
    for pod in environment.in_samples.pods(selector):
        metadata, status = pod["metadata"], pod.get("status", {})
        version = metadata.get("labels", {}).get(LABEL, "")
        if version and _condition(status, "Ready").get("status") == "True":
            written = metadata.get("resourceVersion", "")
            found.append(
                Shown(metadata["name"], metadata["uid"], _life(pod), version, written, pod)
            )
    return found


def _life(pod: Body) -> str:
    """The id of its container, empty before it had one."""
    statuses = pod.get("status", {}).get("containerStatuses", [])
    return str(statuses[0].get("containerID", "")) if statuses else ""


def _unexcused(environment: Environment, selector: str, account: Account) -> list[str]:
    """What did not answer and lives on, Ready or not."""

    def left() -> list[str]:
        pods = environment.in_samples.pods(selector)
        lives = {(str(pod["metadata"]["uid"]), _life(pod)) for pod in pods}
        return [text for life, text in account.unanswered.items() if life in lives]

    try:
        eventually(
            "every engine that did not answer was started anew",
            lambda: not left(),
            EXCUSED_SECONDS,
            2.0,
        )
    except TimedOut:
        return [f"is said to serve, and does not: {text}" for text in left()]
    return []


def _condition(status: Body, type_: str) -> Body:
    return next((c for c in status.get("conditions", []) if c["type"] == type_), {})


@dataclass
class Statements:
    """What the statuses on a tape said, held against the rest of it."""

    # by version: how often a name was looked up, how many words of pods and engines were compared
    # while the rollout said that all serve it
    named: Counter[str] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)
    lies: list[str] = field(default_factory=list)


def judge(tape: Tape) -> Statements:
    """What the statuses on a tape said that was not so; and how many statements were compared.

    *stable* and *previous* name only what the rollout called complete at some time before. When it
    becomes Ready, there are pods, every pod shows the version, and every engine has confirmed it;
    as long as it is Ready, none shows or confirms another one.
    """
    complete: set[str] = set()
    pods: dict[str, Body] = {}
    nodes: dict[str, Body] = {}
    was_ready, is_first = False, True
    found = Statements()
    for said in tape.said:
        if said.kind == "rollout":
            status = said.body.get("status", {})
            if not complete:
                complete |= _known_complete(status)
            target, ready = status.get("target", {}), is_ready(said.body, 0)
            if ready:
                complete.add(target["name"])
                _of_fleet(target, pods, nodes, found, became=not was_ready)
                # of what was there before the tape began, the order may be another one
                if not was_ready and not is_first and not pods:
                    found.lies.append(f"Ready with {target['version']}, and there is no pod")
            for named in ("stable", "previous"):
                name = status.get(named, {}).get("name", "")
                if not name:
                    continue  # it says nothing
                found.named[name] += 1
                if name not in complete:
                    found.lies.append(
                        f"status.{named} names {name}, complete were only {sorted(complete)}"
                    )
            was_ready, is_first = ready, False
            continue
        known = pods if said.kind == "pod" else nodes
        known[said.name] = said.body
        if said.gone:
            del known[said.name]
    found.lies = list(dict.fromkeys(found.lies))
    return found


def _known_complete(status: Body) -> set[str]:
    """What the first status on a tape may name: the tapes before this one have looked at it."""
    names = {status.get(named, {}).get("name", "") for named in ("stable", "previous")}
    return names - {""}


def _of_fleet(
    target: Body, pods: dict[str, Body], nodes: dict[str, Body], found: Statements, *, became: bool
) -> None:
    """What pods and engines say while the rollout says that all serve ``target``."""
    engines = {
        e["podUID"]: e for node in nodes.values() for e in node.get("status", {}).get("engines", [])
    }
    for pod in pods.values():
        metadata: Any = pod["metadata"]
        if "deletionTimestamp" in metadata:
            continue
        label = metadata.get("labels", {}).get(LABEL, "")
        compared = [(label, target["version"])]
        # of a node that wrote after the rollout did, the tape's beginning has only what came later
        if pod.get("spec", {}).get("nodeName") in nodes:
            compared.append((engines.get(metadata["uid"], {}).get("digest", ""), target["digest"]))
        for shown, wanted in compared:
            if not shown and not became:
                continue  # who says nothing may change by then
            found.served[target["version"]] += 1
            if shown != wanted:
                found.lies.append(
                    f"Ready with {target['version']}, and {metadata['name']} says "
                    f"{shown or 'nothing'}"
                )
