"""A whole node in one process, without an API server: driver, session, store, sources, socket; the
engine is played.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hotweights_agent import driver
from hotweights_agent.driver import MAX_WAITING_MESSAGES, Driver
from hotweights_agent.engines.limits import Limits
from hotweights_agent.engines.socket_server import EngineServer
from hotweights_agent.local.state_file import StateFile
from hotweights_agent.metrics import Metrics
from hotweights_agent.node import Node as WholeNode
from hotweights_agent.session.effects import Effect, PodStatus, SendPrepare
from hotweights_agent.session.messages import (
    ApiUnavailable,
    Assigned,
    FrameReceived,
    Message,
    Now,
    Pod,
    ResolveDone,
    StageDone,
    StageFailed,
    Ticked,
)
from hotweights_agent.session.resolving import AT_ONCE
from hotweights_agent.session.session import AgentInfo, Session
from hotweights_agent.settings import RootSettings, StagingSettings
from hotweights_agent.staging import allowed_sources
from hotweights_agent.staging.manifest_cache import ManifestCache
from hotweights_agent.staging.stager import Stager
from hotweights_agent.staging.store import Store
from hotweights_common import files
from hotweights_crds.nodeweights import (
    NodeWeightsSpec,
    NodeWeightsStatus,
    Peer,
    PodAssignment,
    ResolveItem,
    RolloutAssignment,
    StageItem,
)
from hotweights_storage.errors import SourceUnavailable
from hotweights_storage.resolve import publish
from hotweights_storage.sources.file import open_folder
from hotweights_transports.handoff import frames
from hotweights_transports.peers.base import PeerServer
from tests.agent.fake_engine import FakeEngine, until

POD = Pod("uid-1", "ns", "vllm-0")


class Doorman:
    async def authenticate(self, token: str) -> Pod:
        return POD


class Told:
    """Stands where the writers to the API stand."""

    def __init__(self) -> None:
        self.status = NodeWeightsStatus()
        self.pod_status: dict[str, PodStatus] = {}

    def offer(self, status: NodeWeightsStatus, *, urgent: bool) -> None:
        self.status = status

    def want(self, pod: Pod, pod_status: PodStatus) -> None:
        self.pod_status[pod.uid] = pod_status

    def forget(self, uid: str) -> None:
        self.pod_status.pop(uid, None)


class Node:
    def __init__(self, folder: Path, roots: Path) -> None:
        self.store = Store(available=lambda: 2**30)
        self.memory = StateFile(folder / "pods.json")
        self.memory.load()
        self.told = Told()
        self.heard: list[Message] = []
        seconds = itertools.count()
        session = Session(AgentInfo("boot"), reconnect_seconds=0.0)
        self.driver = Driver(
            session,
            self.memory,
            self.store,
            Metrics(),
            lambda: Now(next(seconds) / 5, "2026-01-01T00:00:00Z"),
        )
        self.driver.stager = Stager(
            self.store,
            allowed_sources.allowed([RootSettings(roots, namespaces=("ns",))]),
            ManifestCache(folder / "manifests"),
            self.tell,
            token=lambda: "",
            settings=StagingSettings(patience_seconds=0.2),
        )
        self.driver.server = EngineServer(folder / "node", Doorman(), self.tell, limits=Limits())
        self.driver.status = self.driver.pod_status = self.told
        self.tasks: list[asyncio.Task[None]] = []

    async def tell(self, message: Message) -> None:
        self.heard.append(message)
        await self.driver.tell(message)

    async def start(self) -> None:
        await self.driver.server.start()
        self.tasks.append(asyncio.create_task(self.driver.run()))

    async def close(self) -> None:
        await self.driver.server.close()
        await self.driver.stager.close()
        for task in self.tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def assign(self, stage: list[StageItem], *pods: PodAssignment) -> None:
        await self.tell(
            Assigned(
                NodeWeightsSpec(
                    rollouts=[RolloutAssignment(uid="r", stage=stage, pods=list(pods))]
                ),
                1,
            )
        )

    def engine(self) -> FakeEngine:
        return FakeEngine(self.driver.server.path, "token")

    def ended(self) -> list[StageDone | StageFailed]:
        return [m for m in self.heard if isinstance(m, StageDone | StageFailed)]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hw") as path:
        yield Path(path)


@pytest.fixture
async def node(folder: Path, tmp_path: Path) -> AsyncIterator[Node]:
    found = Node(folder, tmp_path)
    await found.start()
    yield found
    await found.close()


def checkpoint(root: Path, version: str, value: float) -> StageItem:
    folder = root / version
    folder.mkdir()
    save_file(
        {"a": np.full((64, 64), value, np.float32), "b": np.zeros((8,), np.float32)},
        folder / "model.safetensors",
    )
    with open_folder(folder) as source:
        found = publish(source, "m", version).digest
    return StageItem(
        digest=found, namespace="ns", model="m", version=version, uri=f"file://{folder}"
    )


def pod(item: StageItem | None, token: int) -> PodAssignment:
    digest, version = (item.digest, item.version) if item else ("", "")
    return PodAssignment(
        uid=POD.uid, name=POD.name, namespace="ns", token=token, digest=digest, version=version
    )


async def test_from_the_files_to_the_engine(node: Node, tmp_path: Path) -> None:
    v1, v2 = checkpoint(tmp_path, "v1", 1.0), checkpoint(tmp_path, "v2", 2.0)
    await node.assign([v1], pod(v1, 1))
    engine = node.engine()
    await engine.start()
    await until(
        lambda: (
            node.told.pod_status.get(POD.uid)
            == PodStatus(True, "Assigned", "serves v1 as assigned", "v1", v1.digest[7:23])
        )
    )
    await node.assign([v1, v2], pod(v2, 2))
    await until(lambda: engine.digest == v2.digest)
    await node.assign([v2], pod(v2, 2))
    await until(lambda: [v.digest for v in node.store.versions()] == [v2.digest])
    assert node.memory.pods[0].assignment.digest == v2.digest
    await engine.stop()
    await until(lambda: not node.told.pod_status[POD.uid].gate)
    assert [v.pins for v in node.store.versions()] == [0]


async def test_a_disk_that_has_room_again_remembers_without_being_told(
    node: Node, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    v1, replace = checkpoint(tmp_path, "v1", 1.0), files.replace

    def full(path: Path, content: bytes, mode: int) -> None:
        if path.name == "pods.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(path, content, mode)

    monkeypatch.setattr(driver, "DISK_SECONDS", 0.0)
    with monkeypatch.context() as disk:
        disk.setattr(files, "replace", full)
        await node.assign([v1], pod(v1, 1))
        await until(lambda: node.memory.unwritten)
        assert not (folder / "pods.json").exists()
    await until(lambda: not node.memory.unwritten)
    remembered = StateFile(folder / "pods.json")
    remembered.load()
    assert [entry.assignment.digest for entry in remembered.pods] == [v1.digest]


async def test_a_restarted_node_answers_from_its_disk(folder: Path, tmp_path: Path) -> None:
    v1 = checkpoint(tmp_path, "v1", 1.0)
    first = Node(folder, tmp_path)
    await first.start()
    await first.assign([v1], pod(v1, 1))
    await until((folder / "pods.json").exists)
    await first.close()
    second = Node(folder, tmp_path)
    await second.start()
    engine = second.engine()
    await engine.start()
    await asyncio.sleep(0.05)
    assert engine.commits == []
    await second.tell(ApiUnavailable())
    await until(lambda: engine.digest == v1.digest)
    await engine.stop()
    await second.close()


def mapped() -> set[int]:
    """Inodes of the slabs that this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {int(line.split()[4]) for line in lines if "memfd:hotweights-slab" in line}


async def test_an_engine_lets_go_of_the_memory_that_a_former_agent_held(
    folder: Path, tmp_path: Path
) -> None:
    """Neither agent has a keeper. The engine goes on serving, and is asked for no switch."""
    v1, others = checkpoint(tmp_path, "v1", 1.0), mapped()
    first = Node(folder, tmp_path)
    await first.start()
    await first.assign([v1], pod(v1, 1))
    engine = first.engine()
    await engine.start()
    await until(lambda: engine.digest == v1.digest)
    await first.close()
    first.store.release(v1.digest)
    assert first.store.settle()
    await engine.stop()
    old = mapped() - others
    assert old, "nobody can reach it, and the engine has it still"

    second = Node(folder, tmp_path)
    await second.start()
    await engine.start()
    await second.assign([v1], pod(v1, 1))
    await until(lambda: mapped() - others and not mapped() & old)
    with second.store.image(v1.digest) as image:
        assert mapped() - others <= {os.fstat(slab.fd).st_ino for slab in image.slabs}
    assert second.told.pod_status[POD.uid].gate
    assert [commit.digest for commit in engine.commits] == [v1.digest], "of the first agent"
    await engine.stop()
    await second.close()


async def test_a_flipped_byte_is_named_and_nothing_is_staged(node: Node, tmp_path: Path) -> None:
    item = checkpoint(tmp_path, "v1", 1.0)
    path = tmp_path / "v1" / "model.safetensors"
    with open_folder(tmp_path / "v1") as source:
        manifest = publish(source, "m", "v1")
    (tmp_path / "v1" / "hotweights.manifest.json").write_bytes(manifest.canonical)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    await node.assign([item])
    await until(lambda: bool(node.ended()))
    (found,) = node.ended()
    assert isinstance(found, StageFailed)
    assert (found.reason, found.transient) == ("ChecksumMismatch", False)
    assert "model.safetensors" in found.message
    assert node.store.versions() == ()


@pytest.mark.parametrize(
    ("changes", "reason", "transient"),
    [
        ({"uri": "file:///etc"}, "SourceNotAllowed", False),
        ({"uri": "s3://bucket"}, "UnknownScheme", False),
        ({"namespace": "other"}, "SourceNotAllowed", False),
        ({"digest": "sha256:" + "1" * 64}, "DigestMismatch", False),
        (
            {"parents": [Peer(node="b", endpoint="tcp://127.0.0.1:1")], "uri": "file:///etc"},
            "SourceNotAllowed",
            False,
        ),
    ],
    ids=str,
)
async def test_what_cannot_be_staged_says_why(
    node: Node, tmp_path: Path, changes: dict[str, object], reason: str, transient: bool
) -> None:
    await node.assign([checkpoint(tmp_path, "v1", 1.0).model_copy(update=changes)])
    await until(lambda: bool(node.ended()))
    found = node.ended()[0]
    assert isinstance(found, StageFailed)
    assert (found.reason, found.transient) == (reason, transient), found.message
    await until(lambda: node.told.status.staged[0].phase == "Failed")


async def test_a_source_that_is_not_there_yet_is_tried_again(node: Node, tmp_path: Path) -> None:
    item = checkpoint(tmp_path, "v1", 1.0)
    (tmp_path / "v1").rename(tmp_path / "later")
    await node.assign([item])
    await until(lambda: bool(node.ended()))
    assert node.told.status.staged[0].phase == "Fetching"
    (tmp_path / "later").rename(tmp_path / "v1")
    await until(lambda: isinstance(node.ended()[-1], StageDone))


async def test_sources_are_resolved_with_and_without_a_pin(node: Node, tmp_path: Path) -> None:
    item = checkpoint(tmp_path, "v1", 1.0)
    fields = {"namespace": "ns", "model": "m", "version": "v1", "uri": item.uri}
    pins = {"free": "", "right": item.digest, "wrong": "sha256:" + "1" * 64}
    resolve = [
        ResolveItem(uid=uid, name=uid, digest=digest, **fields) for uid, digest in pins.items()
    ]
    await node.tell(Assigned(NodeWeightsSpec(resolve=resolve), 1))
    await until(lambda: len([m for m in node.heard if isinstance(m, ResolveDone)]) == 3)
    results = {m.result.uid: m.result for m in node.heard if isinstance(m, ResolveDone)}
    assert results["free"].digest == results["right"].digest == item.digest
    assert (results["free"].tensors, results["free"].chunks, results["free"].nbytes) == (
        2,
        2,
        64 * 64 * 4 + 32,
    )
    assert (results["wrong"].reason, results["wrong"].digest) == ("DigestMismatch", "")


async def test_reading_sources_keeps_no_version_waiting_and_can_be_called_off(
    node: Node, tmp_path: Path
) -> None:
    """More sources that hang than there are threads of any kind."""
    v1 = checkpoint(tmp_path, "v1", 1.0)
    stager, hung, let_go = node.driver.stager, list[str](), threading.Event()

    class Hanging:
        def open(self, uri: str, namespace: str) -> object:
            hung.append(uri)
            let_go.wait(50)
            raise SourceUnavailable("gone", "SourceNotFound")

    real, stager._sources = stager._sources, Hanging()  # type: ignore[assignment]
    asked = [
        ResolveItem(uid=f"u{i}", namespace="ns", name="w", model="m", version="v", uri=v1.uri)
        for i in range(40)
    ]
    await node.tell(Assigned(NodeWeightsSpec(resolve=asked), 1))
    await until(lambda: len(hung) == AT_ONCE)  # one that opens later would find the real ones
    stager._sources = real
    await node.assign([v1])
    await until(lambda: [type(m) for m in node.ended()] == [StageDone])
    let_go.set()
    await asyncio.sleep(0.05)
    assert [m for m in node.heard if isinstance(m, ResolveDone)] == [], "they were taken back"


async def test_an_engine_that_refuses_serves_on(node: Node, tmp_path: Path) -> None:
    v1 = checkpoint(tmp_path, "v1", 1.0)
    engine = node.engine()
    engine.refuses = "ShapeMismatch"
    await node.assign([v1], pod(None, 1).model_copy(update={"prepare": v1.digest}))
    await engine.start()
    await until(
        lambda: any(
            isinstance(m, FrameReceived) and isinstance(m.frame, frames.Rejected)
            for m in node.heard
        )
    )
    # which of its processes answers first is left open
    await until(
        lambda: (
            [e.phase for e in node.told.status.engines] == ["Refused"]
            and node.told.pod_status[POD.uid].gate
        )
    )
    await engine.stop()


async def test_what_it_tells_itself_does_not_wait_for_its_own_full_queue(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    for task in node.tasks:  # it begins anew, with a session that is played
        task.cancel()
    await asyncio.wait(node.tasks)
    heard: list[Message] = []

    class Played:
        def handle_all(self, messages: Sequence[Message], _now: Now) -> list[Effect]:
            first = not heard
            heard.extend(messages)
            return [SendPrepare(1, 1, "sha256:gone")] if first else []

    monkeypatch.setattr(node.driver, "_session", Played())
    while not node.driver._queue.full():  # its clock may have told it something before
        await node.driver.tell(Ticked())
    node.tasks = [asyncio.create_task(node.driver.run())]
    await until(lambda: len(heard) > MAX_WAITING_MESSAGES)
    assert isinstance(heard[1], StageFailed), "before what others have said"


async def test_healthz_sees_who_accepts_nobody(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(PeerServer):
        def trouble(self) -> str:
            return "tcp://x accepts no peers any more"

        def close(self) -> None: ...

    def stuck(*servers: PeerServer) -> str:
        monkeypatch.setattr(node.driver, "turned_at", time.monotonic())
        return WholeNode(node.driver, node.store, ManifestCache(Path()), (), servers).stuck()

    assert stuck() == ""
    assert stuck(Deaf()) == "tcp://x accepts no peers any more"
    await node.driver.server.close()
    assert "accepts no engines any more" in stuck()
