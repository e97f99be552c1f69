"""A node that only stages: a real stager over a real store, told what to do by a test."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from hotweights_agent.session.messages import Message, ResolveDone, StageDone, StageFailed
from hotweights_agent.settings import StagingSettings
from hotweights_agent.staging.manifest_cache import ManifestCache
from hotweights_agent.staging.stager import Stager
from hotweights_agent.staging.store import Keeper, Store
from hotweights_crds.nodeweights import StageItem
from hotweights_planner.manifest import Manifest
from hotweights_storage.resolve import publish
from hotweights_storage.sources.base import Opener, Root, Sources
from hotweights_storage.sources.file import FileOpener, open_folder


class PlayedNode:
    """Reads files below ``folder``, and what ``openers`` open."""

    def __init__(
        self,
        folder: Path,
        settings: StagingSettings,
        *,
        manifests: str = "manifests",
        keeper: Keeper | None = None,
        **openers: Opener,
    ) -> None:
        self.store = Store(available=lambda: 2**30, keeper=keeper)
        self.manifests = ManifestCache(folder / manifests)
        self.told: asyncio.Queue[Message] = asyncio.Queue()
        self.fetched: Counter[str] = Counter()  # bytes by transport
        self.stager = Stager(
            self.store,
            Sources({"file": FileOpener([Root(folder)]), **openers}),
            self.manifests,
            self.told.put,
            token=lambda: "agent",
            settings=settings,
            fetched=self._note,
        )

    def _note(self, transport: str, nbytes: int) -> None:
        self.fetched[transport] += nbytes

    async def end(self) -> StageDone | StageFailed | ResolveDone:
        """How the next job ends."""
        while True:
            message = await asyncio.wait_for(self.told.get(), 30)
            if isinstance(message, StageDone | StageFailed | ResolveDone):
                return message

    async def close(self) -> None:
        await self.stager.close()
        for version in self.store.versions():
            self.store.release(version.digest)


def published(folder: Path, version: str, scheme: str = "file") -> tuple[StageItem, Manifest]:
    """A small checkpoint, as a node is told of it."""
    root = folder / version
    root.mkdir(parents=True)
    save_file({"a": np.frombuffer(version.encode() * 8192, np.uint8)}, root / "model.safetensors")
    with open_folder(root) as source:
        found = publish(source, "m", version)
    item = StageItem(
        digest=found.digest, namespace="ns", model="m", version=version, uri=f"{scheme}://{root}"
    )
    return item, found
