"""Rounds played one after the other: a change and a fault under traffic, then all must be as it is
to be within five minutes, with no help; and all the while a witness looks whether labels tell the
truth.

A round that shows little is a failed one: too few statements compared, or none of what it ended
with. Where neither the change nor the fault ends an engine, no request may fail either.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from e2e.chaos import deeds
from e2e.chaos.rounds import BEGIN_REPLICAS, BEGIN_VERSION, Fault, Round
from e2e.harness import samples
from e2e.harness.cold import PROMPT, TOKENS
from e2e.harness.environment import SAMPLES, Environment
from e2e.harness.fleet import is_ready
from e2e.harness.kubectl import TimedOut, eventually
from e2e.harness.reach import reach
from e2e.harness.traffic import Traffic
from e2e.harness.witness import LABEL, Account, watch_labels

CONVERGE_SECONDS = 300.0
ENOUGH = 10  # statements that a round has to compare
WITNESS_SECONDS = 90.0  # how long it may take to get them, once all is as it is to be
CALM_SECONDS = 2.0  # traffic is under way before anything happens


@dataclass
class Row:
    """What came of a round."""

    planned: Round
    seed: int
    seconds: float | None = None  # from when the fault was over until all was as it is to be
    compared: int = 0  # statements
    false: list[str] = field(default_factory=list)
    requests: int = 0
    failed: list[str] = field(default_factory=list)  # requests
    lacking: list[str] = field(default_factory=list)  # what was not as it is to be in time

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "seed": self.seed,
            "round": self.planned.number,
            "change": self.planned.change.value,
            "fault": self.planned.fault.value,
            "faultFirst": self.planned.is_fault_first,
            "version": self.planned.version,
            "replicas": self.planned.replicas,
            "secondsToConverge": self.seconds,
            "compared": self.compared,
            "false": len(self.false),
            "requests": self.requests,
            "failedRequests": len(self.failed),
            "problems": self.problems(),
        }

    def problems(self) -> list[str]:
        """Why the round failed; nothing where it did not."""
        found = [f"false: {text}" for text in self.false]
        if self.seconds is None:
            found.append(f"not within {CONVERGE_SECONDS:g} s: {'; '.join(self.lacking)}")
        if self.compared < ENOUGH:
            found.append(f"only {self.compared} statements were compared, {ENOUGH} are to be")
        if self.planned.harms_nobody:
            found += [f"a request failed: {text}" for text in self.failed]
        return found


def begin(environment: Environment) -> None:
    """What there is before the first round; pods that are there already stay."""
    deeds.ours(environment)
    environment.in_samples.apply(SAMPLES / "weightversion.yaml")
    deeds.make_small_disks(environment)
    settle(environment, BEGIN_VERSION, BEGIN_REPLICAS)


def settle(environment: Environment, version: str, replicas: int) -> None:
    """So many pods on this version, with nothing going wrong. Raises `TimedOut`."""
    deeds.lead_to(environment, version)
    environment.in_samples("scale", f"deployment/{deeds.NAME}", f"--replicas={replicas}")
    eventually(
        f"{replicas} pods on {version}",
        lambda: not lacking(environment, version, replicas),
        CONVERGE_SECONDS,
    )


def play(environment: Environment, cold: Mapping[str, list[int]], seed: int, planned: Round) -> Row:
    """What comes of it; it begins where the round before has ended well."""
    row = Row(planned, seed)
    cut = Cut()
    pods = environment.in_samples.pods(deeds.SELECTOR)
    loaded = planned.fault is Fault.RESTART_AGENT
    with (
        watch_labels(
            environment, deeds.SELECTOR, cold, PROMPT, TOKENS, was_cut_off=cut.since
        ) as account,
        reach(environment, pods, 8000) as addresses,
    ):
        with Traffic(addresses, plain=4 if loaded else 1) as traffic:
            time.sleep(CALM_SECONDS)
            seen = strike(environment, planned, cut)
            _converge(environment, planned, seen, row)
        row.requests, row.failed = traffic.requests, traffic.failures
        if row.seconds is not None:
            _see_enough(account, planned)
    row.compared, row.false = account.compared.total(), list(account.lies)
    return row


class Cut:
    """When the API server or a node was last out of reach."""

    def __init__(self) -> None:
        self._until = 0.0

    def since(self, when: float) -> bool:
        """Whether it was so at any moment since then; monotonic seconds."""
        return self._until >= when

    @contextmanager
    def during(self) -> Iterator[None]:
        """It is now."""
        self._until = float("inf")
        try:
            yield
        finally:
            self._until = time.monotonic()


def strike(environment: Environment, planned: Round, cut: Cut) -> deeds.Seen:
    """The change and the fault, in their order, until the fault is over."""
    is_cut = planned.fault in (Fault.CUT_API_SERVER, Fault.CUT_NODE)
    # nobody can ask an API server for anything that is away
    is_asked_after = planned.is_fault_first and planned.fault is Fault.CUT_API_SERVER
    if not planned.is_fault_first:
        deeds.change(environment, planned)
        time.sleep(planned.delay_seconds)
    began = time.monotonic()
    with _during(cut, is_cut), deeds.fault(environment, planned) as seen:
        if planned.is_fault_first and not is_asked_after:
            time.sleep(planned.delay_seconds)
            deeds.change(environment, planned)
        if planned.lasts:
            time.sleep(max(0.0, began + planned.fault_seconds - time.monotonic()))
    if is_asked_after:
        deeds.change(environment, planned)
    return seen


@contextmanager
def _during(cut: Cut, is_cut: bool) -> Iterator[None]:
    if not is_cut:
        yield
        return
    with cut.during():
        yield


def _converge(environment: Environment, planned: Round, seen: deeds.Seen, row: Row) -> None:
    began = time.monotonic()

    def converged() -> bool:
        row.lacking = ["the fault was not noticed"] if not seen() else []
        row.lacking += lacking(environment, planned.version, planned.replicas)
        return not row.lacking

    try:
        eventually("it converges", converged, CONVERGE_SECONDS, every_seconds=0.5)
    except TimedOut as error:
        row.lacking = row.lacking or [str(error)]
    else:
        row.seconds = round(time.monotonic() - began, 1)


def lacking(environment: Environment, version: str, replicas: int) -> list[str]:
    """What is not as it is to be."""
    rollout = environment.in_samples.get("weightrollout", deeds.NAME)
    status = rollout.get("status", {})
    found = []
    if not is_ready(rollout, rollout["metadata"]["generation"]):
        found.append(f"the rollout is {status.get('phase')}: {status.get('message')}")
    elif status["target"]["version"] != version:
        found.append(f"the rollout is Ready with {status['target']['version']}, not {version}")
    pods = environment.in_samples.pods(deeds.SELECTOR)
    if len(pods) != replicas:
        found.append(f"{len(pods)} pods, not {replicas}")
    for pod in pods:
        said = pod["metadata"].get("labels", {}).get(LABEL, "")
        if said != version:
            found.append(f"{pod['metadata']['name']} says {said or 'nothing'}, not {version}")
    for component in ("operator", "agent"):
        pods += samples.system_pods(environment, component)
    found += [f"{pod['metadata']['name']} is not Ready" for pod in pods if not _is_ready(pod)]
    return found


def _is_ready(pod: dict[str, Any]) -> bool:
    conditions = pod.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _see_enough(account: Account, planned: Round) -> None:
    """Until the witness has enough, or for as long as it may take: the row says which."""
    deadline = time.monotonic() + WITNESS_SECONDS
    while time.monotonic() < deadline and not (
        account.compared.total() >= ENOUGH and account.compared[planned.version] >= planned.replicas
    ):
        time.sleep(0.2)
