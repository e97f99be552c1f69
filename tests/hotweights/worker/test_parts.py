"""The worker's pure parts: what an answer means, whom to pull from, who may come in, what may be
read.
"""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from hotweights.worker.allowed_sources import Readable, may_read, sources
from hotweights.worker.assignments import Assignment, Member, Version, spec_of, worker_status
from hotweights.worker.auth import LocalEngineAuthenticator, PeerSecret, engine_token, peer_secret
from hotweights.worker.peers import PeerSelection
from hotweights_agent.engines.socket_auth import Unauthenticated
from hotweights_coordinator.wire.messages import CoordinatorError
from hotweights_crds.nodeweights import EngineStatus, GivenUp, NodeWeightsStatus, StagedVersion
from hotweights_storage.errors import SourceRefused
from hotweights_storage.sources.base import Source, Sources

SECONDS = 30.0
OLD, NEW = "sha256:" + "0" * 64, "sha256:" + "1" * 64


def version(digest: str, token: int = 1) -> Version:
    return Version(
        version="v", digest=digest, token=token, plan_digest=digest, uri="file:///x", model="m"
    )


def staged(*digests: str, failed: str = "") -> NodeWeightsStatus:
    entries = [StagedVersion(digest=digest, phase="Staged") for digest in digests]
    if failed:
        entries.append(
            StagedVersion(digest=failed, phase="Failed", reason="NoDisk", message="it is gone")
        )
    return NodeWeightsStatus(staged=entries)


def engine(**fields: Any) -> EngineStatus:
    return EngineStatus(**({"pod_uid": "e", "phase": "Serving"} | fields))


def test_while_an_attempt_is_open_engines_prepare_it_and_serve_what_is_current() -> None:
    spec = spec_of(version(NEW, 5), version(OLD, 3), 5, ["e"], {})
    assert [item.digest for item in spec.rollouts[0].stage] == [NEW, OLD]
    pod = spec.rollouts[0].pods[0]
    assert (pod.digest, pod.prepare, pod.token) == (OLD, NEW, 5)


def test_what_is_committed_is_to_be_served() -> None:
    pod = spec_of(None, version(NEW), 5, ["e"], {}).rollouts[0].pods[0]
    assert (pod.digest, pod.prepare) == (NEW, "")


def test_only_an_open_attempt_is_an_attempt() -> None:
    answer = {
        "token": 5,
        "state": "aborted",
        "version": "v",
        "digest": NEW,
        "plan_digest": NEW,
        "current": None,
    }
    assert Assignment.parse(answer).attempt is None
    assert Assignment.parse(answer | {"state": "begun"}).attempt is not None
    with pytest.raises(CoordinatorError, match="token"):
        Assignment.parse({"state": "begun"})


@pytest.mark.parametrize(
    ("status", "ready"),
    [
        (staged(OLD), False),
        (staged(NEW), True),
        (staged(NEW).model_copy(update={"engines": [engine()]}), False),
        (staged(NEW).model_copy(update={"engines": [engine(prepared=NEW)]}), True),
        (
            staged(NEW).model_copy(update={"engines": [engine(prepared=NEW), engine(pod_uid="f")]}),
            False,
        ),
        (staged(NEW).model_copy(update={"engines": [engine(phase="Disconnected")]}), True),
    ],
)
def test_ready_means_here_and_prepared_by_all(status: NodeWeightsStatus, ready: bool) -> None:
    assert worker_status(status, version(NEW), version(OLD)).ready is ready


def test_applied_means_that_every_engine_confirmed() -> None:
    confirmed = staged(OLD).model_copy(update={"engines": [engine(digest=OLD)]})
    assert worker_status(confirmed, None, version(OLD)).applied
    assert not worker_status(
        confirmed.model_copy(update={"engines": [engine(digest=NEW)]}), None, version(OLD)
    ).applied
    assert not worker_status(staged(NEW), None, version(OLD)).applied


def test_a_failure_is_told_for_what_is_asked_now() -> None:
    assert worker_status(staged(OLD, failed=NEW), version(NEW), version(OLD)).failure == (
        "NoDisk",
        "it is gone",
    )
    assert worker_status(staged(OLD, failed=NEW), None, version(OLD)).failure is None
    gave_up = GivenUp(digest=NEW, token=5, step="Prepare", reason="ShapeMismatch", message="x")
    refused = staged(NEW).model_copy(update={"engines": [engine(phase="Refused", failed=gave_up)]})
    assert worker_status(refused, version(NEW, 5), None).failure == ("ShapeMismatch", "engine e: x")
    assert worker_status(refused, version(NEW, 6), None).failure is None, "it is another attempt"
    assert worker_status(refused, version(OLD, 6), None).failure is None, (
        "it failed at another version"
    )


def members(*names: str, address: str = "10.0.0.{}") -> list[dict[str, Any]]:
    return [
        {
            "worker_id": name,
            "endpoints": [f"tcp://{address.format(n)}:1", f"ucx://{address.format(n)}:2"],
            "zone": "",
        }
        for n, name in enumerate(names)
    ]


def test_peers_are_reached_by_the_transport_that_works_here() -> None:
    others = members("a", "b")
    assert (
        PeerSelection("me", "10.0.0.9", "", ["tcp"])
        .donors(others)
        .parents[0]
        .endpoint.startswith("tcp://")
    )
    assert (
        PeerSelection("me", "10.0.0.9", "", ["ucx", "tcp"])
        .donors(others)
        .parents[0]
        .endpoint.startswith("ucx://")
    )
    assert PeerSelection("me", "10.0.0.9", "", ["inproc"]).donors(others).parents == ()


def test_a_worker_never_pulls_from_itself() -> None:
    peering = PeerSelection("a", "10.0.0.0", "", ["tcp"])
    everybody = peering.everybody(members("a", "b", "c"))
    assert {peer.node for peer in everybody.parents} == {"b", "c"}
    chain = peering.chain([Member(worker_id="a", endpoints=("tcp://x:1",))], [])
    assert chain.parents == ()


def test_near_donors_give_stripes_and_far_ones_stand_by() -> None:
    near, far = members("a", "b", "c"), members("x", "y", address="10.9.0.{}")
    route = PeerSelection("me", "10.0.0.9", "", ["tcp"]).donors(near + far)
    assert {peer.node for peer in route.parents} == {"a", "b", "c"}
    assert {peer.node for peer in route.fallbacks} == {"x", "y"}


async def test_engines_come_in_by_the_token_and_may_have_a_name() -> None:
    door = LocalEngineAuthenticator("secret")
    assert (await door.authenticate("secret")).uid == "engine"
    assert (await door.authenticate("secret:left")).uid == "left"
    for token in ("", "other", "secret:../x", "secret2", "s"):
        with pytest.raises(Unauthenticated):
            await door.authenticate(token)


def test_the_engines_token_outlives_the_worker(tmp_path: Path) -> None:
    first = engine_token(tmp_path)
    (tmp_path / "engine.token").chmod(0o644)
    assert engine_token(tmp_path) == first
    assert (tmp_path / "engine.token").stat().st_mode & 0o777 == 0o600
    (tmp_path / "engine.token").write_text("")
    assert len(engine_token(tmp_path)) > 20


def test_peers_show_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOTWEIGHTS_PEER_TOKEN", raising=False)
    secret = peer_secret("the coordinator's")
    door = PeerSecret(secret)
    assert door.protected
    assert "coordinator" not in door.token()
    assert secret not in door.token()
    assert door(door.token()) is not None
    assert door(PeerSecret("other").token()) is None
    assert door("") is None
    assert not PeerSecret(peer_secret("")).protected
    monkeypatch.setenv("HOTWEIGHTS_PEER_TOKEN", "own")
    assert peer_secret("the coordinator's") == "own"


def test_only_what_lies_below_the_roots_is_read(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in side", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    allowed = sources([inside])
    assert may_read(allowed, inside.as_uri())
    assert may_read(allowed, f"{inside.as_uri()}/later")
    assert not may_read(allowed, outside.as_uri())
    assert not may_read(allowed, "s3://bucket/x")
    with pytest.raises(SourceRefused, match="--root"):
        allowed.open(outside.as_uri(), "")
    (inside / "way-out").symlink_to(outside)
    assert not may_read(allowed, f"{inside.as_uri()}/way-out")


async def test_a_source_that_does_not_answer_keeps_no_heartbeat_waiting(tmp_path: Path) -> None:
    """A FIFO that nobody writes to hangs in the kernel as a hard mount does."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    asked, hangs = 0, threading.Event()

    class Mount:
        def open(self, uri: str, namespace: str) -> Source:
            nonlocal asked
            asked += 1
            hangs.set()
            os.close(os.open(fifo, os.O_RDONLY))
            raise SourceRefused("it leads out of its root")

    readable = Readable(Sources({"nfs": Mount()}), wait_seconds=0.1)
    async with asyncio.timeout(SECONDS):
        for _ in range(20):
            assert await readable.may("nfs://v"), "one that is merely not there may be read"
    assert await asyncio.to_thread(hangs.wait, SECONDS)
    assert asked == 1, "and no threads pile up"
    writer = os.open(fifo, os.O_RDWR)  # open until it went on: it may not be in its open yet
    async with asyncio.timeout(SECONDS):
        await readable._asked["nfs://v"]
    os.close(writer)
    assert not await readable.may("nfs://v")


async def test_whether_a_source_may_be_read_is_known_at_once_where_it_answers(
    tmp_path: Path,
) -> None:
    readable = Readable(sources([tmp_path]), wait_seconds=SECONDS)
    assert await readable.may(tmp_path.as_uri())
    assert not await readable.may("file:///etc")
