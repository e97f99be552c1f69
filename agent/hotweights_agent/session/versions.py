"""Which versions the node is to hold, which it holds, and what to do about the difference.

Sans-IO and by level: `NodeVersions.next_effects` compares what is wanted with what is there and
says what to start, stop and let go of. A version that failed in a way that may pass is tried again,
ever more rarely, until its own timeout; one that failed otherwise is left alone until its entry
changes. It knows no engine; the session tells it which versions engines still need.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from hotweights_agent.session.effects import CancelStage, Effect, ReleaseVersion, Stage
from hotweights_agent.session.messages import StageDone, StageFailed, StageProgressed
from hotweights_agent.session.retry import RetryPolicy, RetryState
from hotweights_common.backoff import Backoff
from hotweights_common.reasons import Reason
from hotweights_common.sanitize import clip
from hotweights_crds.nodeweights import StagedVersion, StageItem, StagePhase

STAGE_RETRIES = RetryPolicy(
    most=1000, backoff=Backoff(1.0, 60.0, factor=3.0)
)  # the item's timeout ends it, not the count
FAILED_AFTER = 3  # failures until it is reported as failed; it is tried further until its timeout
CANCEL_SECONDS = 30.0  # how long a cancelled fetch may take to end before it is given up


@dataclass(slots=True)
class NodeVersion:
    """One version on its way onto the node, or there."""

    item: StageItem
    phase: StagePhase
    started_at: float  # seconds; of the first try, because the item's timeout is for all of them
    retries: RetryState = field(default_factory=RetryState)
    version: str = ""  # its name by its manifest; empty until it is here
    bytes_done: int = 0
    bytes_total: int = 0
    bytes_fetched: int = 0
    seconds: float = 0.0  # of the try that brought it
    how: str = ""
    tried: StageItem | None = None  # that the last fetch began with; what it says is of no other
    golden_kinds: frozenset[str] = frozenset()  # of engines that it has golden tokens for
    image: int = 0  # grows with every staging of the digest: a rejected image is not offered twice

    @property
    def trying_again(self) -> bool:
        """Whether it failed, but not often enough yet to be called failed."""
        return (
            self.phase == "Failed"
            and not self.retries.given_up
            and self.retries.failures < FAILED_AFTER
        )

    def status(self) -> StagedVersion:
        """Its entry in the node's status; texts are cut to what the fields take."""
        return StagedVersion(
            digest=self.item.digest,
            # 63: a label's value (Kubernetes, "Labels and Selectors")
            version=clip(self.version or self.item.version, 63),
            phase="Fetching" if self.trying_again else self.phase,
            bytes_done=self.bytes_done,
            bytes_total=self.bytes_total,
            bytes_fetched=self.bytes_fetched,
            seconds=round(self.seconds, 3),
            reason="" if self.phase == "Staged" else clip(self.retries.reason, 64),
            message=clip(self.how if self.phase == "Staged" else self.retries.message, 512),
        )


class NodeVersions:
    """All versions that the node holds or is to hold, by digest."""

    def __init__(self) -> None:
        self._held: dict[str, NodeVersion] = {}
        self._ending: dict[str, float] = {}  # cancelled fetches that have not ended: digest → when
        self._images = 0

    def status(self) -> list[StagedVersion]:
        """Entries for the node's status, sorted by digest, so that equal states are equal texts."""
        return [self._held[digest].status() for digest in sorted(self._held)]

    def staged(self, digest: str) -> bool:
        """Whether it is whole, verified and here."""
        held = self._held.get(digest)
        return held is not None and held.phase == "Staged"

    def image(self, digest: str) -> int:
        """Which staging of the digest this is, counted from 1 over all versions since the agent's
        start; 0 when it is not staged.
        """
        return self._held[digest].image if self.staged(digest) else 0

    def golden_kinds(self, digest: str) -> frozenset[str]:
        """The kinds of engine that a staged version has golden tokens for."""
        return self._held[digest].golden_kinds if self.staged(digest) else frozenset()

    def get(self, digest: str) -> NodeVersion | None:
        """What is known of a version; None when it is in no stage list."""
        return self._held.get(digest)

    def progressed(self, message: StageProgressed) -> None:
        """Bytes arrived; those of a fetch that was called off do not count for the next one."""
        held = self._held.get(message.digest)
        if held is not None and held.phase == "Fetching" and message.digest not in self._ending:
            held.bytes_done = message.bytes_done
            held.bytes_total = message.bytes_total
            held.bytes_fetched = message.bytes_fetched

    def done(self, message: StageDone) -> list[Effect]:
        """It is here. One that nobody waits for any more is let go of."""
        held = self._held.get(message.digest)
        cancelled = self._ending.pop(message.digest, None) is not None
        if cancelled or held is None or held.phase != "Fetching":
            return [ReleaseVersion(message.digest)]
        self._images += 1
        held.phase, held.image, held.retries = "Staged", self._images, RetryState()
        held.version, held.golden_kinds = message.version, message.golden_kinds
        held.bytes_done = held.bytes_total = message.bytes_total
        held.bytes_fetched, held.seconds, held.how = (
            message.bytes_fetched,
            message.seconds,
            message.how,
        )
        return []

    def failed(self, message: StageFailed, now: float) -> None:
        """Plan the next try, or none after its timeout; what was called off is no failure."""
        cancelled = self._ending.pop(message.digest, None) is not None
        held = self._held.get(message.digest)
        if cancelled or held is None or held.phase != "Fetching":
            return
        retries = held.retries.failed(
            now, STAGE_RETRIES, message.reason, message.message, transient=message.transient
        )
        held.retries = retries.until(held.started_at + held.item.timeout_seconds)
        held.phase = "Failed"

    def next_effects(
        self, wanted: Mapping[str, StageItem], needed: Collection[str], now: float
    ) -> list[Effect]:
        """What to do now: ``wanted`` are to be here, ``needed`` must not go yet."""
        effects: list[Effect] = []
        for digest in [d for d in self._held if d not in wanted]:
            effects += self._let_go(digest, needed, now)
        self._ending = {d: at for d, at in self._ending.items() if now - at < CANCEL_SECONDS}
        for digest, item in wanted.items():
            effects += self._bring(digest, item, now)
        return effects

    def _let_go(self, digest: str, needed: Collection[str], now: float) -> list[Effect]:
        phase = self._held[digest].phase
        if phase == "Staged" and digest in needed:  # an engine is reading its memory
            return []
        del self._held[digest]
        if phase == "Fetching":
            self._ending[digest] = now
            return [CancelStage(digest)]
        return [ReleaseVersion(digest)] if phase == "Staged" else []

    def _bring(self, digest: str, item: StageItem, now: float) -> list[Effect]:
        held = self._held.get(digest)
        # another source, route or timeout is another chance, with the whole time, also where it
        # came while the one before was being tried
        if held is None or (held.phase == "Failed" and held.tried != item):
            held = self._held[digest] = NodeVersion(item, "Waiting", now)
        held.item = item
        if held.phase == "Fetching" and now >= held.started_at + item.timeout_seconds:
            return self._timed_out(held, now)
        startable = held.phase == "Waiting" or (
            held.phase == "Failed" and held.retries.may_start(now)
        )
        # one at a time: the end of the cancelled fetch would be taken for the end of this one
        if not startable or digest in self._ending:
            return []
        held.phase, held.tried = "Fetching", item
        held.bytes_done = held.bytes_total = held.bytes_fetched = 0
        return [Stage(item)]

    def _timed_out(self, held: NodeVersion, now: float) -> list[Effect]:
        text = (
            f"not staged within {held.item.timeout_seconds} s; raise staging.timeoutSeconds or "
            "see why it is slow"
        )
        held.retries = held.retries.failed(
            now, STAGE_RETRIES, Reason.STAGE_TIMEOUT, text, transient=False
        )
        held.phase = "Failed"
        self._ending[held.item.digest] = now
        return [CancelStage(held.item.digest)]
