"""Brings versions onto the node and reads sources, in threads, and tells the session what became of
it.

One job for each version: find its manifest (kept here, at a parent, or at the source), wait for its
turn, make room, fetch, seal. All of it can be cancelled at any moment. What goes wrong becomes a
reason and a sentence; whether another try makes sense is said beside it. Which versions are wanted,
and when a failed one is tried again, is the session's to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import quote

from hotweights_agent.session.messages import (
    Message,
    ResolveDone,
    StageDone,
    StageFailed,
    StageProgressed,
)
from hotweights_agent.session.resolving import AT_ONCE
from hotweights_agent.settings import StagingSettings
from hotweights_agent.staging.broadcasts import (
    BUCKET_NBYTES,
    BroadcastResult,
    Broadcasts,
    BroadcastTask,
)
from hotweights_agent.staging.chunk_sources import OriginSource, connected, in_order
from hotweights_agent.staging.config_file import bring_config
from hotweights_agent.staging.fetch import Fetch, FetchFailed, Progress
from hotweights_agent.staging.fetch_policy import FetchPolicy
from hotweights_agent.staging.manifest_cache import ManifestCache
from hotweights_agent.staging.places import Places
from hotweights_agent.staging.progress import ByteCounter
from hotweights_agent.staging.store import StagingVersion, Store
from hotweights_common.errors import HotweightsError
from hotweights_common.reasons import Reason
from hotweights_crds.nodeweights import MAX_STAGED, ResolvedVersion, ResolveItem, StageItem
from hotweights_planner.errors import Refused
from hotweights_planner.manifest import Manifest, parse
from hotweights_planner.plan import build
from hotweights_storage.errors import (
    Cancelled,
    ChecksumMismatch,
    SourceRefused,
    TransferError,
)
from hotweights_storage.resolve import resolve
from hotweights_storage.source_reads import SourceReads
from hotweights_storage.sources.base import Sources
from hotweights_transports.peers.base import PeerClient, PeerError, PeerMissing
from hotweights_transports.peers.rate_limiter import RateLimiter

log = logging.getLogger(__name__)

MANIFEST_AGAIN_SECONDS = 0.5  # between two rounds of asking parents that do not know it yet
MANIFEST_NBYTES = 64 * 2**20
"""What a peer may send as a manifest, or a quarter of the agent's own reserve if that is more: it is
received before its digest can be compared. At 67 bytes a chunk of 4 MiB that is 4 TB of weights; a
larger one is read at the source.
"""
JOBS_AT_ONCE = MAX_STAGED  # threads; most of them wait for their turn (`Places`)
READERS = 2 * AT_ONCE
"""Threads of their own for sources that are only read for their manifest, so that these keep no
version waiting; twice as many as are read at a time, because it takes a moment to call one off.
"""


class DigestDiffers(TransferError):
    """The source does not hold the version that was asked for."""

    reason = Reason.DIGEST_MISMATCH


class Stager:
    """Does what `Stage`, `CancelStage`, `Resolve` and `CancelResolve` ask for."""

    def __init__(
        self,
        store: Store,
        sources: Sources,
        kept: ManifestCache,
        tell: Callable[[Message], Awaitable[None]],
        *,
        token: Callable[[], str],
        settings: StagingSettings | None = None,
        broadcasts: Broadcasts | None = None,
        prove_sources: bool = False,
        fetched: Callable[[str, int], None] = lambda _transport, _nbytes: None,
    ) -> None:
        """``token`` proves to peers who we are; ``prove_sources``: a manifest beside weights is not
        believed unread; ``fetched`` hears how many bytes came by which transport.
        """
        self._store = store
        self._sources = sources
        self._kept = kept
        self._tell = tell
        self._token = token
        self._settings = settings or StagingSettings()
        self._most_manifest_nbytes = max(MANIFEST_NBYTES, self._settings.reserve_bytes // 4)
        self._broadcasts = broadcasts
        self._prove_sources = prove_sources
        self._fetched = fetched
        self._places = Places(self._settings.at_once)
        self._reads = SourceReads(self._settings.source_stall_seconds)
        bandwidth = self._settings.bandwidth_bytes_per_second
        self._throttle = RateLimiter(bandwidth) if bandwidth else None  # of all fetches together
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(JOBS_AT_ONCE, thread_name_prefix="staging")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="resolving")
        self._cancels: dict[str, threading.Event] = {}  # of stagings, by digest
        self._calls_off: dict[str, threading.Event] = {}  # of readings, by UID
        self._jobs: set[asyncio.Task[None]] = set()

    def stage(self, item: StageItem) -> None:
        """Begin to bring a version here; a message tells how it ends."""
        cancel = self._cancels[item.digest] = threading.Event()
        self._start(self._stage(item, cancel))

    def cancel(self, digest: str) -> None:
        """Stop it; its job ends with a `StageFailed`."""
        cancel = self._cancels.get(digest)
        if cancel is not None:
            cancel.set()

    def prefer(self, digests: Collection[str]) -> None:
        """These come before all others: pods wait for them, and serve nothing meanwhile."""
        self._places.prefer(digests)

    @property
    def stuck_reads(self) -> int:
        """How many readings of sources hang, left behind by whoever asked for them."""
        return self._reads.stuck

    def resolve(self, item: ResolveItem) -> None:
        """Begin to read a source; a message tells what it holds."""
        off = self._calls_off[item.uid] = threading.Event()
        self._start(self._resolve(item, off))

    def cancel_resolve(self, uid: str) -> None:
        """Stop reading it; no message follows. The thread ends when it looks the next time."""
        off = self._calls_off.pop(uid, None)
        if off is not None:
            off.set()

    async def close(self) -> None:
        """Cancel everything and wait for it, threads too: they hold memory of the store. Calls of
        sources that hang are left behind.
        """
        for cancel in (*self._cancels.values(), *self._calls_off.values()):
            cancel.set()
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.to_thread(self._readers.shutdown)

    def _start(self, job: Awaitable[None]) -> None:
        task = asyncio.ensure_future(job)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)

    async def _stage(self, item: StageItem, cancel: threading.Event) -> None:
        began = time.monotonic()
        try:
            done = await self._loop.run_in_executor(self._threads, self._bring, item, cancel, began)
        except (HotweightsError, OSError) as error:
            await self._tell(_failure(item.digest, error))
            return
        finally:
            if self._cancels.get(item.digest) is cancel:
                del self._cancels[item.digest]
        await self._tell(done)

    def _bring(self, item: StageItem, cancel: threading.Event, began: float) -> StageDone:
        """In a thread: the whole way of one version."""
        deadline = began + item.timeout_seconds
        with contextlib.ExitStack() as stack:
            named = (*item.parents, *item.fallbacks)
            # of two at one address the first counts, as it does for whom is asked
            keys = {peer.endpoint: peer.key for peer in reversed(named)}
            peers = connected(stack, [peer.endpoint for peer in named], self._token, keys=keys)
            manifest = self._manifest(item, peers, cancel)
            # after the manifest, which costs no memory, and before any of it is taken
            moved = stack.enter_context(self._places.place(item.digest, cancel, deadline))
            staging = stack.enter_context(self._store.begin(manifest))
            total, needed = manifest.nbytes, staging.needed_nbytes
            here = max(0, total - needed)  # chunks that other versions brought

            brought = BroadcastResult(0, "")
            seen = 0

            def report(progress: Progress) -> None:
                nonlocal seen
                fetched = brought.nbytes + progress.done_nbytes
                if fetched > seen:
                    seen = fetched
                    moved()
                self._tell_from_thread(
                    StageProgressed(item.digest, min(total, here + fetched), total, fetched)
                )

            sources = in_order(
                peers,
                self._origin(item, manifest),
                item.digest,
                {peer.endpoint for peer in item.parents},
                self._settings.donors_at_once,
                reads_origin=not item.parents,
            )
            report(Progress(0, needed, ()))
            brought = self._broadcast(item, manifest, staging, cancel, report)
            policy = FetchPolicy(
                deadline_seconds=max(1.0, deadline - time.monotonic()),
                patience_seconds=self._settings.patience_seconds,
            )
            result = Fetch(
                staging.builder,
                sources,
                policy=policy,
                cancel=cancel,
                progress=report,
                throttle=self._throttle,
            ).run()
            bring_config(staging.builder, sources, cancel)
            staging.commit()  # leaving the context without this gives the memory back
        for name, nbytes in result.by_source:
            self._fetched(name.partition(":")[0], nbytes)
        self._fetched(brought.scheme, brought.nbytes)
        fetched = brought.nbytes + result.done_nbytes
        return StageDone(
            item.digest,
            manifest.version,
            total,
            fetched,
            time.monotonic() - began,
            brought.how,
            golden_kinds=frozenset(probe.engine for probe in manifest.probes or ()),
        )

    def _broadcast(
        self,
        item: StageItem,
        manifest: Manifest,
        staging: StagingVersion,
        cancel: threading.Event,
        report: Callable[[Progress], None],
    ) -> BroadcastResult:
        """What comes to all at once. What does not is fetched afterwards."""
        job = item.collective
        if job is None or self._broadcasts is None:
            return BroadcastResult(0, "")
        base = self._kept.get(job.base) if job.base else None
        if job.base and base is None:
            return BroadcastResult(
                0,
                f"each node for itself: {job.base}, on which the broadcast builds, is not "
                "known here any more",
            )
        plan = build(manifest, base, quote(item.uri, safe="/:%"), BUCKET_NBYTES, renamed=True)
        came = ByteCounter(lambda nbytes: report(Progress(nbytes, staging.needed_nbytes, ())))
        source = partial(self._sources.open, item.uri, item.namespace)
        return self._broadcasts.bring(
            BroadcastTask(job, plan, staging.builder, source, self._reads, cancel, came)
        )

    def _origin(self, item: StageItem, manifest: Manifest) -> OriginSource:
        workers = self._settings.origin_workers or None  # as many as the quota makes sensible
        opened = partial(self._sources.open, item.uri, item.namespace)
        return OriginSource(item.uri, opened, manifest, workers, self._reads)

    def _manifest(
        self, item: StageItem, peers: list[PeerClient], cancel: threading.Event
    ) -> Manifest:
        """The version's manifest: kept here, beside its memory, at whoever has it first, else what
        the source holds.
        """
        manifest = (
            self._kept.get(item.digest)
            or self._store.manifest_of(item.digest)
            or self._manifest_of_peers(item, peers, cancel)
        )
        if manifest is None:
            manifest = self._manifest_of_source(item, cancel)
            _check_digest(manifest, item.digest, item.uri)
        self._kept.put(manifest)
        return manifest

    def _manifest_of_peers(
        self, item: StageItem, peers: list[PeerClient], cancel: threading.Event
    ) -> Manifest | None:
        """Parents are asked until they know the version, but not longer than our patience lasts;
        without parents it is this node that is to read the source, so others are asked once.
        """
        patience_seconds = self._settings.patience_seconds if item.parents else 0.0
        patient_until = time.monotonic() + patience_seconds
        hopeful = list(peers)
        while hopeful:
            for client in list(hopeful):
                if cancel.is_set():
                    raise Cancelled("cancelled while it looked for the manifest")
                try:
                    text = client.fetch_manifest(item.digest, self._most_manifest_nbytes)
                    return parse(text, client.address, item.digest)
                except PeerMissing:
                    pass
                except PeerError as error:
                    log.warning("%s gives no manifest: %s", client.address, error)
                    hopeful.remove(client)
            if time.monotonic() >= patient_until:
                return None
            cancel.wait(MANIFEST_AGAIN_SECONDS)
        return None

    async def _resolve(self, item: ResolveItem, off: threading.Event) -> None:
        try:
            manifest = await self._loop.run_in_executor(self._readers, self._read_source, item, off)
            done = ResolveDone(
                ResolvedVersion(
                    uid=item.uid,
                    digest=manifest.digest,
                    nbytes=manifest.nbytes,
                    tensors=len(manifest.tensors),
                    chunks=manifest.chunk_count,
                )
            )
        except (HotweightsError, OSError) as error:
            failure = _failure(item.digest, error)
            result = ResolvedVersion(uid=item.uid, reason=failure.reason, message=failure.message)
            done = ResolveDone(result, failure.transient)
        finally:
            if self._calls_off.get(item.uid) is off:
                del self._calls_off[item.uid]
        if not off.is_set():
            await self._tell(done)

    def _read_source(self, item: ResolveItem, off: threading.Event) -> Manifest:
        """In a thread: what a source holds; its content is held against the digest that it must
        have.
        """
        manifest = self._manifest_of_source(item, off, prove=self._prove_sources)
        if item.digest:
            _check_digest(manifest, item.digest, item.uri)
        self._kept.put(manifest)
        return manifest

    def _manifest_of_source(
        self, item: StageItem | ResolveItem, stop: threading.Event, *, prove: bool = False
    ) -> Manifest:
        return self._reads.read(
            item.uri,
            partial(self._sources.open, item.uri, item.namespace),
            lambda source, limits: resolve(
                source, item.model, item.version, limits=limits, prove=prove
            ),
            stop,
        )

    def _tell_from_thread(self, message: Message) -> None:
        asyncio.run_coroutine_threadsafe(_as_coroutine(self._tell(message)), self._loop)


async def _as_coroutine(awaitable: Awaitable[None]) -> None:
    await awaitable


def _check_digest(manifest: Manifest, digest: str, uri: str) -> None:
    if manifest.digest != digest:
        raise DigestDiffers(
            f"{uri} holds {manifest.digest}, not {digest}: it was overwritten or never published "
            "as that; publish into a folder of its own and create a WeightVersion for it"
        )


def _failure(digest: str, error: Exception) -> StageFailed:
    """What is told of an exception."""
    match error:
        case FetchFailed():
            return StageFailed(digest, error.reason, str(error), error.transient)
        case DigestDiffers() | SourceRefused() | ChecksumMismatch() | Refused():
            return StageFailed(digest, error.reason, str(error), transient=False)
        case HotweightsError():
            return StageFailed(digest, error.reason, str(error), transient=True)
        case _:
            return StageFailed(
                digest,
                Reason.INPUT_OUTPUT_ERROR,
                f"{error}; see the node's kernel log",
                transient=True,
            )
