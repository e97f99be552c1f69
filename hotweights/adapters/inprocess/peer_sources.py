"""Brings a plan's version into this process: chunks from peers and from the source, each verified,
under the model's names.

The image of the last version stays, so that the next one costs only what changed. A source is
opened only under the allowed roots, as a worker does it: those that were named, else
``HOTWEIGHTS_ROOTS`` (separated by colons), else the current folder.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hotweights.adapters.inprocess import names
from hotweights.adapters.inprocess.errors import NotApplied
from hotweights.adapters.inprocess.names import NameMap
from hotweights.adapters.inprocess.version import Version
from hotweights.adapters.vllm.rank.fit.dry_load import Spec
from hotweights.adapters.vllm.rank.image import Image as MappedImage
from hotweights.home import ROOTS_VARIABLE
from hotweights.worker.allowed_sources import may_read, sources
from hotweights_agent.staging.chunk_sources import OriginSource, connected, in_order
from hotweights_agent.staging.fetch import Fetch
from hotweights_agent.staging.fetch_policy import FetchPolicy
from hotweights_common.reasons import Reason
from hotweights_planner.plan import Plan
from hotweights_storage.image import Image, ImageBuilder


def allowed_roots(roots: Iterable[str | os.PathLike[str]] | None) -> tuple[Path, ...]:
    """Where sources may lie; none: below the current folder."""
    if roots is None and os.environ.get(ROOTS_VARIABLE):
        roots = os.environ[ROOTS_VARIABLE].split(os.pathsep)
    return tuple(Path(root).resolve() for root in roots or ())


@dataclass(frozen=True, slots=True)
class PeerSources:
    """Who may have a version's chunks, beside its source: endpoints, and what proves to them who we
    are.
    """

    peers: Sequence[str] = ()
    token: Callable[[], str] = str


class PlanStaging:
    """Brings one version at a time, in the thread that asks; keeps the last one's memory."""

    def __init__(self, roots: Sequence[Path], name_map: NameMap) -> None:
        self._sources = sources(roots)
        self._name_map = name_map
        self._image: Image | None = None

    def bring(self, plan: Plan, seconds: float, peer_sources: PeerSources | None = None) -> Version:
        """The plan's version, whole and verified, within ``seconds``. Raises `TransferError`;
        `NotApplied` for the name map, and where nobody is allowed to be asked.
        """
        manifest = plan.manifest
        present = {} if self._image is None else self._image.chunks
        listed = [{"name": t.name, "dtype": t.dtype, "shape": t.shape} for t in manifest.tensors]
        called = names.renamed(self._name_map, plan.document, listed)
        peer_sources = peer_sources or PeerSources()
        if not peer_sources.peers and not may_read(self._sources, plan.source):
            text = (
                f"{plan.source} may not be read by this process; allow its folder with roots=[…] "
                f"or {ROOTS_VARIABLE}"
            )
            raise NotApplied(Reason.SOURCE_NOT_ALLOWED, text)
        with contextlib.ExitStack() as stack:
            builder = stack.enter_context(ImageBuilder(manifest, present))
            if builder.missing_count:
                clients = connected(stack, peer_sources.peers, peer_sources.token)
                origin = OriginSource(
                    plan.source, lambda: self._sources.open(plan.source, ""), manifest
                )
                # without peers there is nobody whose chunks could still be on their way
                limits = FetchPolicy(
                    deadline_seconds=seconds, patience_seconds=0.0 if not clients else 5.0
                )
                Fetch(
                    builder,
                    in_order(clients, origin, manifest.digest),
                    policy=limits,
                    cancel=threading.Event(),
                ).run()
            image = builder.finish()
        # mapped before the old one is closed: if that fails, the next try still has its chunks
        mapped = MappedImage.open(image.fds, manifest.digest)
        if self._image is not None:
            self._image.close()
        self._image = image
        specs = {
            called[tensor.name]: Spec(tensor.dtype, tensor.shape) for tensor in manifest.tensors
        }
        return Version(
            manifest.digest,
            manifest.version,
            specs,
            ((called[name], t) for name, t in mapped.tensors()),
        )

    def close(self) -> None:
        """Give the memory of the last version back; the model does not need it."""
        if self._image is not None:
            self._image.close()
            self._image = None
