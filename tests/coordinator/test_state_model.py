"""Whole lives of a coordinator, drawn at random, against a model of a few lines; and what must be
true after every step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hotweights_coordinator.backends.base import decode, encode
from hotweights_coordinator.state import state
from hotweights_coordinator.state.state import CoordinatorState, PlanRef, Worker
from hotweights_coordinator.wire.messages import CallRefused

WORKERS = ("a", "b", "c")
VERSIONS = ("v1", "v2")
DEADLINE_SECONDS = 100.0


def plan_of(version: str) -> PlanRef:
    return PlanRef(f"plan-{version}", version, f"manifest-{version}", f"file:///{version}", "m", 10)


@dataclass
class Model:
    """What a coordinator is, said as simply as possible."""

    phase: str = "idle"
    token: int = 0
    plan: str = ""
    version: str = ""
    current: str = ""
    begun_at: float = 0.0
    at_once: bool = False
    workers: dict[str, int] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)

    @property
    def open(self) -> bool:
        return self.phase in ("begun", "precommitted")

    def not_ready(self, worker: str) -> None:
        """Died, or started anew: where nobody is left who has prepared it, there is nothing to
        commit.
        """
        if self.open:
            self.ready.discard(worker)
            self.phase = self.phase if self.ready else "begun"

    def settle(self) -> None:
        if self.phase == "begun" and self.workers and self.ready >= set(self.workers):
            self.phase = "precommitted"
        if self.phase == "precommitted" and self.at_once:
            self.phase, self.current = "committed", self.version

    def end(self) -> None:
        self.phase, self.token = "aborted", self.token + 1


class Coordinator(RuleBasedStateMachine):
    """Anything may be asked in any order, twice, and with tokens of the past and of the future."""

    def __init__(self) -> None:
        super().__init__()
        self.durable = CoordinatorState()
        self.model = Model()
        self.now = 1000.0
        self.highest = 0
        self.committed: set[int] = set()

    def does(self, expected: str, transition: str, *args: object) -> bool:
        """Do it; then do it again, which must change nothing. True: it was not refused."""
        before = self.durable
        if expected:
            with pytest.raises(CallRefused) as refused:
                getattr(state, transition)(before, *args)
            assert refused.value.reason == expected
            return False
        self.durable = getattr(state, transition)(before, *args)
        again = getattr(state, transition)(self.durable, *args)
        assert again is self.durable, f"{transition} twice changed something"
        return True

    @initialize(workers=st.sets(st.sampled_from(WORKERS)))
    def some_are_there(self, workers: set[str]) -> None:
        for worker in sorted(workers):
            self.register(worker, 0)

    @rule(worker=st.sampled_from(WORKERS), instance=st.integers(0, 1))
    def register(self, worker: str, instance: int) -> None:
        model = self.model
        self.does("", "register", Worker(worker, "h", instance=str(instance)), self.now)
        if model.workers.get(worker, instance) != instance:
            model.not_ready(worker)
        model.workers[worker] = instance

    @rule(workers=st.just(set(WORKERS)) | st.sets(st.sampled_from(WORKERS), min_size=1))
    def fall_silent(self, workers: set[str]) -> None:
        model = self.model
        self.does("", "drop", sorted(workers), self.now)
        if gone := [worker for worker in workers if model.workers.pop(worker, None) is not None]:
            for worker in gone:
                model.not_ready(worker)
            model.settle()

    @rule(version=st.sampled_from(VERSIONS))
    def submit(self, version: str) -> None:
        model = self.model
        busy = model.open and model.plan != version
        if self.does("Busy" if busy else "", "submit_plan", plan_of(version), self.now):
            model.plan = version

    @rule(
        version=st.sampled_from(VERSIONS),
        at_once=st.booleans(),
        digest=st.sampled_from((None, "right", "wrong")),
    )
    def begin(self, version: str, at_once: bool, digest: str | None) -> None:
        model = self.model
        named = {None: None, "right": f"manifest-{version}", "wrong": "other"}[digest]
        expected = ""
        if model.open:
            expected = "Busy" if model.version != version or digest == "wrong" else ""
        elif model.plan != version:
            expected = "WrongVersion"
        elif digest == "wrong":
            expected = "DigestMismatch"
        if not self.does(expected, "begin", version, named, DEADLINE_SECONDS, at_once, self.now):
            return
        if model.open:
            model.at_once |= at_once
        elif not (model.phase == "committed" and model.version == version):
            model.phase, model.version, model.token, model.ready = (
                "begun",
                version,
                model.token + 1,
                set(),
            )
            model.at_once, model.begun_at = at_once, self.now
            return
        model.settle()

    @rule(worker=st.sampled_from(WORKERS), offset=st.sampled_from((0, 0, 0, -1, 1)))
    def precommit(self, worker: str, offset: int) -> None:
        model = self.model
        expected = ""
        if worker not in model.workers:
            expected = "UnknownWorker"
        elif model.phase == "idle":
            expected = "NothingBegun"
        elif offset:
            expected = "StaleToken"
        elif model.phase == "aborted":
            expected = "Aborted"
        if self.does(expected, "precommit", worker, model.token + offset, self.now) and model.open:
            model.ready.add(worker)
            model.settle()

    @rule(version=st.sampled_from(VERSIONS), at_once=st.sampled_from((False, False, True)))
    def update(self, version: str, at_once: bool) -> None:
        """As it should go: steps that are drawn one by one seldom get so far."""
        self.submit(version)
        self.begin(version, at_once, None)
        for worker in sorted(self.model.workers):
            self.precommit(worker, 0)

    @rule(version=st.sampled_from(VERSIONS), offset=st.sampled_from((None, 0, -1)))
    def commit(self, version: str, offset: int | None) -> None:
        model = self.model
        expected = ""
        if model.phase == "idle":
            expected = "NotPrecommitted"
        elif model.version != version:
            expected = "WrongVersion"
        elif offset:
            expected = "StaleToken"
        elif model.phase not in ("precommitted", "committed"):
            expected = "NotPrecommitted"
        token = None if offset is None else model.token + offset
        if self.does(expected, "commit", version, token, self.now):
            assert model.phase == "committed" or model.ready & set(model.workers), (
                "committed what nobody could serve"
            )
            model.phase, model.current = "committed", version

    @rule(offset=st.sampled_from((None, 0, -1, -2)))
    def abort(self, offset: int | None) -> None:
        model = self.model
        # an abort took the next token
        counts = (None, 0, -1) if model.phase == "aborted" else (None, 0)
        if model.phase == "idle":
            expected = "NothingBegun"
        elif offset not in counts:
            expected = "StaleToken"
        else:
            expected = "AlreadyCommitted" if model.phase == "committed" else ""
        token = None if offset is None else model.token + offset
        if self.does(expected, "abort", "because", self.now, token) and model.open:
            model.end()

    @rule(worker=st.sampled_from(WORKERS), offset=st.sampled_from((None, 0, -1)))
    def fails(self, worker: str, offset: int | None) -> None:
        model = self.model
        token = None if offset is None else model.token + offset
        self.does("", "fail", worker, token, "ChecksumMismatch", "bad bytes", self.now)
        if model.open and not offset:
            model.end()

    @rule(seconds=st.sampled_from((1.0, 60.0)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.does("", "expire", self.now)
        if self.model.open and self.now >= self.model.begun_at + DEADLINE_SECONDS:
            self.model.end()

    @rule()
    def somebody_else_leads(self) -> None:
        self.durable = state.take_over(decode(encode(self.durable)), "other", self.now)

    @invariant()
    def is_what_the_model_says(self) -> None:
        durable, model = self.durable, self.model
        attempt = durable.attempt
        assert (durable.phase, durable.token) == (model.phase, model.token)
        assert set(durable.workers) == set(model.workers)
        assert (durable.current.version if durable.current else "") == model.current
        assert (durable.manifest.version if durable.manifest else "") == model.current
        assert (durable.plan.version if durable.plan else "") == model.plan
        if attempt is not None and attempt.is_open:
            assert attempt.precommits == model.ready
            assert attempt.token == model.token

    @invariant()
    def tokens_only_grow(self) -> None:
        assert self.durable.token >= self.highest
        self.highest = self.durable.token

    @invariant()
    def all_have_prepared_what_is_precommitted(self) -> None:
        attempt = self.durable.attempt
        if attempt is not None and attempt.phase == "begun" and self.durable.workers:
            assert self.durable.waiting_for, "nobody is waited for, and it is not precommitted"

    @invariant()
    def only_who_is_registered_has_prepared(self) -> None:
        attempt = self.durable.attempt
        if attempt is not None and attempt.is_open:
            assert attempt.precommits <= self.durable.workers.keys()

    @invariant()
    def committed_stays_committed(self) -> None:
        attempt, current = self.durable.attempt, self.durable.current
        if attempt is not None and attempt.phase == "committed":
            assert current is not None
            assert (current.token, current.digest) == (attempt.token, attempt.plan.manifest_digest)
            self.committed.add(attempt.token)
        if attempt is not None and attempt.phase != "committed":
            assert attempt.token not in self.committed, "a committed attempt became another one"

    @invariant()
    def names_every_blob_that_it_needs(self) -> None:
        durable = self.durable
        if durable.current is not None:
            assert {durable.current.plan_digest, durable.current.digest} <= durable.blobs
        if durable.plan is not None:
            assert durable.plan.digest in durable.blobs


Coordinator.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
)
TestCoordinator = Coordinator.TestCase
