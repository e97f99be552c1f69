"""One process's side of an election: whose the lease is, for how long, and what it writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest

from hotweights_kube import Body, Election, Timing

AT = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Object:
    """The Lease as an API server keeps it: each write is another version."""

    body: Body | None = None
    version: int = 0

    def take(self, asked: Body) -> Body | None:
        """Write it; None: it was refused."""
        known = self.body["metadata"]["resourceVersion"] if self.body else None
        if asked["metadata"].get("resourceVersion") != known:
            return None
        self.version += 1
        metadata = {**asked["metadata"], "resourceVersion": str(self.version)}
        self.body = {**asked, "metadata": metadata}
        return self.body


@dataclass
class Process:
    """An operator with a clock of its own."""

    lease: Object
    name: str
    offset: float = 0.0  # of its clock
    election: Election = field(init=False)

    def __post_init__(self) -> None:
        self.election = Election(self.name)

    def tries(self, now: float, *, release: bool = False, answered: bool = True) -> bool:
        """As `Leadership` does; whether it leads then."""
        now += self.offset
        if not self.election.lead_seconds(now):
            self.election.observed(self.lease.body, now)
        if self.election.may_try(now):
            written = self.lease.take(self.election.ask("l", "n", now, AT, release=release))
            if written is not None and answered:
                self.election.renewed(written)
            elif answered or self.election.lead_seconds(now):
                self.election.observed(self.lease.body, now)
        return self.election.lead_seconds(now) > 0


def two(offset: float = 1e6) -> tuple[Process, Process]:
    lease = Object()
    return Process(lease, "a"), Process(lease, "b", offset)


def test_the_first_one_leads_and_the_second_stands_by_while_it_renews() -> None:
    first, second = two()
    assert first.tries(0.0)
    for now in range(2, 60, 2):
        assert first.tries(now)
        assert not second.tries(now)
    assert second.election.holder == "a"


def test_the_lease_of_a_dead_one_is_taken_when_it_ran_out_by_the_own_clock() -> None:
    first, second = two()
    first.tries(0.0)
    assert not second.tries(1.0)  # from now on it counts
    assert not second.tries(15.9)
    assert second.tries(16.0)
    assert second.election.taken_from == "a"
    assert second.lease.body is not None
    assert second.lease.body["spec"]["leaseTransitions"] == 2


def test_nobody_may_write_when_another_may_lead() -> None:
    """For whenever the other one looks: the leader's term ends first, with time for an answer."""
    for late in (0.0, 0.5, 2.0, 5.0):
        first, second = two()
        first.tries(0.0)
        second.tries(late)
        taken = next(t / 10 for t in range(1000) if t / 10 >= late and second.tries(t / 10))
        assert first.election.lead_seconds(taken - 4.9) == 0.0
        assert first.election.safe_seconds(taken) == 0.0


def test_who_wakes_up_after_its_term_leads_no_more_and_stands_by() -> None:
    first, second = two()
    first.tries(0.0)
    second.tries(0.0)
    assert second.tries(15.0)
    assert first.election.lead_seconds(40.0) == 0.0
    assert not first.tries(29.0)
    assert first.election.holder == "b"


def test_what_was_given_up_is_taken_at_once_and_from_nobody() -> None:
    first, second = two()
    first.tries(0.0)
    second.tries(1.0)
    assert not first.tries(2.0, release=True)
    assert second.tries(2.1)
    assert second.election.taken_from == ""


def test_of_two_who_take_a_free_lease_one_is_refused() -> None:
    first, second = two()
    first.election.observed(None, 0.0)
    second.election.observed(None, 0.0)
    asked = second.election.ask("l", "n", 0.0, AT)
    assert first.tries(0.0)
    assert second.lease.take(asked) is None


def test_a_renewal_of_which_the_answer_was_lost_is_known_again() -> None:
    first, _ = two()
    assert first.tries(0.0)
    assert first.tries(8.0, answered=False)
    assert first.election.lead_seconds(8.0) == 10.0
    assert first.election.taken_from == ""


def test_a_container_that_restarted_takes_its_own_lease_at_once_and_not_as_given_up() -> None:
    """The pod is the same, the process that led is dead, what it wrote may still be on its way."""
    first, _ = two()
    first.tries(0.0)
    again = Process(first.lease, "a", 5.0)
    assert again.tries(1.0)
    assert again.election.taken_from == "a"


def test_who_leads_and_finds_another_write_leads_no_more_even_under_its_own_name() -> None:
    first, _ = two()
    first.tries(0.0)
    again = Process(first.lease, "a", 5.0)
    again.tries(1.0)
    first.election.observed(first.lease.body, 2.0)
    assert first.election.lead_seconds(2.0) == 0.0


def test_a_longer_lease_of_another_is_waited_for() -> None:
    lease = Object()
    first, second = Process(lease, "a"), Process(lease, "b")
    first.election.timing = Timing(60.0, 40.0, 2.0)
    first.tries(0.0)
    second.tries(0.0)
    assert not second.tries(59.0)
    assert second.tries(60.0)


@pytest.mark.parametrize("wrong", [(15.0, 15.0, 2.0), (15.0, 2.0, 10.0), (15.0, 10.0, 0.0)])
def test_times_by_which_two_could_lead_are_refused(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="retry < renew < lease"):
        Timing(*wrong)
