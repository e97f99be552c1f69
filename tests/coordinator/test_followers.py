"""Coordinators that do not lead: they tell what is written, and nothing that only the leader heard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from hotweights.cli import app
from hotweights_coordinator.backends.base import Lease
from hotweights_coordinator.backends.memory import MemoryBackend
from hotweights_coordinator.client.client import Client
from tests.coordinator.running import CALL_SECONDS, Coordinator, begun, plan, running


class Follower(MemoryBackend):
    """Somebody else leads."""

    leader = ""

    async def lead(self, instance_id: str, endpoint: str) -> Lease:
        return Lease(mine=False, fence=3, leader=self.leader, until=0.0)


@contextmanager
def followed(shared: MemoryBackend, leader: Coordinator) -> Iterator[Coordinator]:
    """A coordinator that reads what ``leader`` has written."""
    backend = Follower()
    backend.leader = leader.endpoint
    backend.__dict__.update(_blobs=shared._blobs, _state=shared._state)
    with running(backend) as follower:
        yield follower


def committed(client: Client) -> None:
    """Two workers; one of them has applied what is committed."""
    for worker in "ab":
        client.call("register", worker_id=worker)
    token = begun(client)
    for worker in "ab":
        client.call("precommit", worker_id=worker, token=token)
    client.call("commit", version="v1", token=token)
    digest = plan().manifest.digest
    client.call("applied", worker_id="a", version="v1", digest=digest, token=token)


def test_followers_tell_what_holds_and_who_leads() -> None:
    shared = MemoryBackend()
    with running(shared) as leader, leader.client() as client:
        begun(client)
        with followed(shared, leader) as follower:
            with follower.client() as other:
                status = other.call("status").result
                assert (status["state"], status["leads"]) == ("begun", False)
                assert status["leader"] == leader.endpoint
            with follower.client() as other:
                assert other.call("get_plan").binary == plan().canonical
                other.call("register", worker_id="late")  # goes on to the leader by itself
            assert "late" in client.call("status").result["workers"]


def test_a_follower_does_not_tell_what_only_the_leader_heard() -> None:
    """Whoever asked it whether all had applied a version would have waited in vain."""
    shared = MemoryBackend()
    with running(shared) as leader, leader.client() as client:
        committed(client)
        with (
            followed(shared, leader) as follower,
            Client(
                follower.endpoint, "", timeout_seconds=CALL_SECONDS, prefers_leader=True
            ) as other,
        ):
            worker = other.call("list_workers").result["workers"][0]
            assert (worker["have"], worker["silence_seconds"]) == (None, None)
            told = other.call("status").result
            assert (told["state"], told["applied"], told["waiting_for"]) == (
                "committed",
                None,
                None,
            )
            told = other.call("status").result  # the leader was named, so it is asked
            assert (told["leads"], told["applied"], told["waiting_for"]) == (True, ["a"], ["b"])


def test_whoever_looks_at_one_coordinator_goes_on_to_see_that_one() -> None:
    shared = MemoryBackend()
    with running(shared) as leader, followed(shared, leader) as follower:
        with follower.client() as other:
            told = [other.call("status").result["leads"] for _ in range(2)]
        assert told == [False, False]


@pytest.mark.parametrize("command", ["status", "coord-status"])
def test_of_several_that_are_named_the_leader_is_asked(command: str) -> None:
    shared = MemoryBackend()
    with running(shared) as leader, leader.client() as client:
        committed(client)
        with followed(shared, leader) as follower:

            def said(endpoints: str) -> str:
                words = [command, "--json", "--timeout", "50", "--endpoint", endpoints]
                done = CliRunner().invoke(app, words)
                assert done.exit_code == 0, done.output
                return done.output

            assert '"leads": true' in said(f"{follower.endpoint},{leader.endpoint}")
            assert '"leads": false' in said(follower.endpoint)


def test_the_page_of_a_follower_says_what_it_does_not_know() -> None:
    shared = MemoryBackend()
    with running(shared) as leader, leader.client() as client:
        committed(client)
        with followed(shared, leader) as follower:
            words = ["coord-status", "--timeout", "50", "--endpoint", follower.endpoint]
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, done.output
            assert "applied not known" in done.output
            assert f"follows {leader.endpoint}" in done.output
