"""What Prometheus is told.

Names say what is counted and in which unit. Labels are bounded: no pod, no digest, no version is
one.
"""

from __future__ import annotations

import logging
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from hotweights_agent.session.messages import FrameReceived, Message, StageDone, StageFailed
from hotweights_agent.session.phases import Phase
from hotweights_common.reasons import COUNTED_BY_AGENTS, Reason
from hotweights_crds.nodeweights import NodeWeightsStatus, ProbeStrength
from hotweights_transports.handoff import frames

log = logging.getLogger(__name__)

# seconds; from what a commit takes to the default bound of its pause
PAUSE_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 15.0, 60.0)
# seconds; up to the default bound of staging
STAGE_BUCKETS = (0.5, 1.0, 2.0, 5.0, 15.0, 60.0, 180.0, 600.0, 1800.0)

PROBES: tuple[ProbeStrength, ...] = get_args(ProbeStrength)


class Metrics:
    """All metrics of one agent, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.staged = Counter(
            "hotweights_agent_staged_bytes", "Bytes of versions that became staged.", registry=r
        )
        self.stage_seconds = Histogram(
            "hotweights_agent_stage_seconds",
            "From the order to a staged version.",
            buckets=STAGE_BUCKETS,
            registry=r,
        )
        self.stage_failures = Counter(
            "hotweights_agent_stage_failures", "Stagings that failed.", ["reason"], registry=r
        )
        self.fetched = Counter(
            "hotweights_agent_fetched_bytes",
            "Verified bytes, by transport.",
            ["transport"],
            registry=r,
        )
        self.stuck_reads = Gauge(
            "hotweights_agent_stuck_reads",
            "Readings of sources that hang in the kernel and were left behind.",
            registry=r,
        )
        self.checksums = Counter(
            "hotweights_agent_checksum_failures",
            "Chunks with other bytes than promised.",
            registry=r,
        )
        self.commits = Counter(
            "hotweights_agent_commits", "Answers to commits.", ["result"], registry=r
        )
        self.rejections = Counter(
            "hotweights_agent_prepare_rejections", "Refused prepares.", ["reason"], registry=r
        )
        self.pauses = Histogram(
            "hotweights_agent_pause_seconds",
            "Pauses of commits.",
            buckets=PAUSE_BUCKETS,
            registry=r,
        )
        self.engines = Gauge("hotweights_agent_engines", "Engines by phase.", ["phase"], registry=r)
        self.proved = Gauge(
            "hotweights_agent_proved_engines",
            "Engines that confirmed a version, by what proved it.",
            ["probe"],
            registry=r,
        )
        self.capacity = Gauge(
            "hotweights_agent_capacity_bytes", "Memory for versions.", ["kind"], registry=r
        )
        self.reviews = Counter(
            "hotweights_agent_token_reviews", "Token reviews.", ["audience", "result"], registry=r
        )
        self.api_writes = Counter(
            "hotweights_agent_api_writes", "Writes to the API.", ["object", "result"], registry=r
        )
        self.defects = Counter(
            "hotweights_agent_defects",
            "Defects of the agent: what it left out of an exception that nobody expected.",
            registry=r,
        )

    def note(self, message: Message) -> None:
        """Count what a message tells. The driver calls it for each, before the session hears it."""
        match message:
            case StageDone():
                self.staged.inc(message.bytes_total)
                self.stage_seconds.observe(message.seconds)
            case StageFailed():
                self.stage_failures.labels(_bounded(message.reason)).inc()
                if message.reason == Reason.CHECKSUM_MISMATCH:
                    self.checksums.inc()
            case FrameReceived(frame=frames.Committed() as frame):
                self.commits.labels("Committed").inc()
                # an engine's word: one nonsense must not spoil the sum
                self.pauses.observe(max(0.0, min(frame.pause_seconds, 3600.0)))
            case FrameReceived(frame=frames.CommitFailed() as frame):
                self.commits.labels("Dirty" if frame.dirty else _bounded(frame.reason)).inc()
            case FrameReceived(frame=frames.Rejected() as frame):
                self.rejections.labels(_bounded(frame.reason)).inc()
            case _:
                pass

    def show(self, status: NodeWeightsStatus) -> None:
        """Set what is a state rather than an event."""
        for phase in Phase:
            self.engines.labels(phase.value).set(
                sum(1 for engine in status.engines if engine.phase == phase.value)
            )
        for probe in PROBES:
            self.proved.labels(probe or "Unknown").set(
                sum(1 for engine in status.engines if engine.digest and engine.probe == probe)
            )
        self.capacity.labels("memory").set(status.capacity.memory_bytes)
        self.capacity.labels("free").set(status.capacity.free_bytes)


# those that plugin, storage and peers are known to give


def _bounded(reason: str) -> str:
    """A reason as a label: words from outside must not become time series without end."""
    return reason if reason in COUNTED_BY_AGENTS else "Other"
