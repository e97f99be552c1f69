"""Nodes that get a version together: real stagers, peers over TCP, and real MPI jobs between
them.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from numpy import frombuffer, uint8
from safetensors.numpy import save_file

from hotweights_agent.session.messages import Message, StageDone, StageFailed
from hotweights_agent.settings import RootSettings, StagingSettings
from hotweights_agent.staging.allowed_sources import allowed
from hotweights_agent.staging.broadcasts import BroadcastContext, Broadcasts
from hotweights_agent.staging.manifest_cache import ManifestCache
from hotweights_agent.staging.stager import Stager
from hotweights_agent.staging.store import Store
from hotweights_crds.nodeweights import Collective, Peer, StageItem
from hotweights_planner.manifest import Manifest
from hotweights_storage.resolve import publish
from hotweights_storage.sources.file import open_folder
from hotweights_transports.broadcast.invitation import Groups, Inviting
from hotweights_transports.broadcast.leader import GroupLeader
from hotweights_transports.peers.base import Identity
from hotweights_transports.peers.proof import ServerKey
from hotweights_transports.peers.registry import transport_for
from tests.agent.fake_engine import until

pytestmark = pytest.mark.timeout(240)  # ranks are processes

NAMES = ("a", "b", "c")
IDENTITIES = {f"token-{name}": Identity("agent", name) for name in NAMES}
MIB = 1 << 20


class Node:
    """One agent's stager with its peers' server."""

    def __init__(
        self, stack: ExitStack, name: str, folder: Path, patience_seconds: float, roots: Path
    ) -> None:
        self.name = name
        self.store = Store(available=lambda: 1 << 33)
        self.kept = ManifestCache(folder / name)
        self.told: asyncio.Queue[Message] = asyncio.Queue()
        self.fetched: dict[str, int] = {}
        self.groups = groups = Groups(self._token)
        key = ServerKey()
        server = stack.enter_context(
            transport_for("tcp://127.0.0.1:0").listen(
                "tcp://127.0.0.1:0",
                Inviting(self.store, groups),
                IDENTITIES.get,
                prove=key.prove,
            )
        )
        key.serves_at(server.address)
        self.peer = Peer(node=name, endpoint=server.address, key=key.public)
        self.stager = Stager(
            self.store,
            allowed([RootSettings(roots, namespaces=("*",))]),
            self.kept,
            self.told.put,
            token=self._token,
            settings=StagingSettings(patience_seconds=patience_seconds, at_once=2),
            broadcasts=Broadcasts(
                BroadcastContext(name, "127.0.0.1", self._token, IDENTITIES.get, groups),
                patience_seconds=patience_seconds,
            ),
            fetched=self._count,
        )

    def _token(self) -> str:
        return f"token-{self.name}"

    def _count(self, scheme: str, nbytes: int) -> None:
        self.fetched[scheme] = self.fetched.get(scheme, 0) + nbytes

    async def ended(self) -> StageDone | StageFailed:
        """How the staging ended."""
        async with asyncio.timeout(100):
            while True:
                message = await self.told.get()
                if isinstance(message, StageDone | StageFailed):
                    return message

    def content(self, manifest: Manifest) -> bytes:
        """All chunks as the image has them."""
        with self.store.image(manifest.digest) as image:
            places = [
                image.range(digest) for tensor in manifest.tensors for digest in tensor.chunks
            ]
            return b"".join(
                os.pread(place[0], place[2], place[1]) for place in places if place is not None
            )


class Fleet:
    """Three nodes and a folder of versions."""

    def __init__(self, stack: ExitStack, folder: Path, patience_seconds: float) -> None:
        self.models = folder / "models with a space"
        self.models.mkdir()
        self.nodes = {
            name: Node(stack, name, folder, patience_seconds, self.models) for name in NAMES
        }

    def version(self, name: str, *seeds: int) -> Manifest:
        """A version of one tensor of 5 MiB for each seed."""
        folder = self.models / name
        folder.mkdir()
        tensors = {
            f"layers.{number}.weight": frombuffer(
                random.Random(seed).randbytes(5 * MIB), dtype=uint8
            )
            for number, seed in enumerate(seeds)
        }
        save_file(tensors, folder / "model.safetensors")
        with open_folder(folder) as source:
            return publish(source, "m", name)

    def item(self, manifest: Manifest, node: str, base: str = "", **changes: object) -> StageItem:
        """What the operator would tell the node: a chain, and a broadcast along it."""
        before = NAMES[NAMES.index(node) - 1] if node != NAMES[0] else ""
        item = StageItem(
            digest=manifest.digest,
            namespace="ns",
            model="m",
            version=manifest.version,
            uri=f"file://{self.models}/{manifest.version}",
            parents=[self.nodes[before].peer] if before else [],
            collective=Collective(
                name=f"job of {manifest.version}",
                head=self.nodes["a"].peer.endpoint.replace("tcp", "mpi"),
                head_key=self.nodes["a"].peer.key,
                members=list(NAMES),
                base=base,
            ),
        )
        return item.model_copy(update=changes)

    async def stage(
        self, manifest: Manifest, *names: str, base: str = ""
    ) -> dict[str, StageDone | StageFailed]:
        for name in names:
            self.nodes[name].stager.stage(self.item(manifest, name, base))
        return {name: await self.nodes[name].ended() for name in names}

    async def close(self) -> None:
        for node in self.nodes.values():
            await node.stager.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


async def test_all_get_it_and_one_reads(stack: ExitStack, tmp_path: Path) -> None:
    fleet = Fleet(stack, tmp_path, 60)
    manifest = fleet.version("v1", 1, 2, 3, 4, 5)
    ended = await fleet.stage(manifest, *NAMES)
    for name in NAMES:
        done = ended[name]
        assert isinstance(done, StageDone), done
        assert done.how == "by a broadcast to 3 nodes, for which a read the source"
        assert done.bytes_fetched == manifest.nbytes
    assert fleet.nodes["a"].content(manifest) == fleet.nodes["c"].content(manifest)
    assert fleet.nodes["a"].fetched["file"] == manifest.nbytes
    assert fleet.nodes["b"].fetched == fleet.nodes["c"].fetched | {
        "tcp": 0,
        "mpi": manifest.nbytes,
        "file": 0,
    }
    await fleet.close()


async def test_only_what_changed_is_sent(stack: ExitStack, tmp_path: Path) -> None:
    fleet = Fleet(stack, tmp_path, 60)
    old, new = fleet.version("v1", 1, 2, 3), fleet.version("v2", 1, 9, 3)
    await fleet.stage(old, *NAMES)
    before = fleet.nodes["c"].fetched["mpi"]
    ended = await fleet.stage(new, *NAMES, base=old.digest)
    assert ended.keys() == set(NAMES)
    assert all(
        isinstance(done, StageDone) and done.how.startswith("by a broadcast")
        for done in ended.values()
    )
    assert fleet.nodes["c"].fetched["mpi"] - before == 5 * MIB
    assert fleet.nodes["c"].content(new) == fleet.nodes["a"].content(new)
    await fleet.close()


async def test_without_one_of_them_the_others_pull(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = GroupLeader.gather

    def gather_when_b_is_here(lead: GroupLeader) -> None:
        """However long that takes on a busy machine: the head's patience begins with it."""
        with lead._changed:
            lead._changed.wait_for(lambda: 1 in lead._channels, 50)
        gather(lead)

    monkeypatch.setattr(GroupLeader, "gather", gather_when_b_is_here)
    fleet = Fleet(stack, tmp_path, 1.0)
    manifest = fleet.version("v1", 1, 2)
    fleet.nodes["a"].stager.stage(fleet.item(manifest, "a"))
    await until(lambda: bool(fleet.nodes["a"].groups._open))
    fleet.nodes["b"].stager.stage(fleet.item(manifest, "b"))
    for name in ("a", "b"):
        done = await fleet.nodes[name].ended()
        assert isinstance(done, StageDone), done
        assert "each node for itself, for the broadcast was lost: rank 2 did not come" in done.how
    assert fleet.nodes["b"].fetched["tcp"] == manifest.nbytes
    late = (await fleet.stage(manifest, "c"))["c"]
    assert isinstance(late, StageDone)
    assert "the others began without this node" in late.how
    await fleet.close()


async def test_who_does_not_prove_to_be_the_head_invites_nobody(
    stack: ExitStack, tmp_path: Path
) -> None:
    fleet = Fleet(stack, tmp_path, 20)
    manifest = fleet.version("v1", 1, 2)
    item = fleet.item(manifest, "b", parents=[])
    assert item.collective is not None
    job = item.collective.model_copy(update={"head_key": ServerKey().public})
    fleet.nodes["b"].stager.stage(item.model_copy(update={"collective": job}))
    done = await fleet.nodes["b"].ended()
    assert isinstance(done, StageDone)
    assert "each node for itself, for the broadcast was lost" in done.how
    assert "it did not prove that it is the agent of this route, and got no token" in done.how
    await fleet.close()


async def test_a_wrong_chunk_is_named_and_reaches_nobody(stack: ExitStack, tmp_path: Path) -> None:
    fleet = Fleet(stack, tmp_path, 3)
    manifest = fleet.version("v1", 1, 2, 3)
    path = fleet.models / "v1" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-MIB] ^= 1
    path.write_bytes(content)
    for node in fleet.nodes.values():
        node.kept.put(manifest)
    ended = await fleet.stage(manifest, *NAMES)
    for failed in ended.values():
        assert isinstance(failed, StageFailed), failed
        assert failed.reason == "ChecksumMismatch"
        assert "model.safetensors" in failed.message
    await fleet.close()


async def test_a_cancelled_one_does_not_wait_for_the_others(
    stack: ExitStack, tmp_path: Path
) -> None:
    fleet = Fleet(stack, tmp_path, 60)
    manifest = fleet.version("v1", 1)
    for name in ("a", "b"):
        fleet.nodes[name].kept.put(manifest)
        fleet.nodes[name].stager.stage(fleet.item(manifest, name))
    await asyncio.sleep(0.5)
    began = time.monotonic()
    for name in ("a", "b"):
        fleet.nodes[name].stager.cancel(manifest.digest)
        failed = await fleet.nodes[name].ended()
        assert isinstance(failed, StageFailed)
        assert failed.reason == "Cancelled"
    assert time.monotonic() - began < 30, "it waited for its patience to end"
    await fleet.close()


async def test_a_base_that_is_gone_is_said(stack: ExitStack, tmp_path: Path) -> None:
    fleet = Fleet(stack, tmp_path, 0.5)
    manifest = fleet.version("v1", 1)
    done = (await fleet.stage(manifest, "a", base="sha256:" + "0" * 64))["a"]
    assert isinstance(done, StageDone)
    assert "is not known here any more" in done.how
    await fleet.close()
