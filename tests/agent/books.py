"""What engines were asked and how it ended, kept beside the session, so that its word on failures
can be held against it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from hotweights_agent.session import effects as fx
from hotweights_agent.session.session import Session
from hotweights_agent.session.timeouts import COMMIT_RETRIES, PREPARE_RETRIES, EngineTimeouts
from hotweights_common.reasons import TRANSIENT_FOR_ENGINES, Reason
from hotweights_crds.nodeweights import NodeWeightsStatus, PodAssignment
from hotweights_transports.handoff import frames

MOST = {"Prepare": PREPARE_RETRIES.most, "Commit": COMMIT_RETRIES.most}


class Ask(NamedTuple):
    """What one engine was asked for, in one of its lives."""

    uid: str
    life: int
    step: str
    digest: str
    token: int
    # and of which rollout, and where the version may wait for how long a pause
    revision: tuple[str, int, str, int]
    image: int  # of a prepare: which staging of the digest


class Question(NamedTuple):
    """What a connection has not answered."""

    id: int
    until: float  # of a prepare, in seconds: then it has failed
    ask: Ask


class Books:
    """Fed by the world with what truly happens."""

    def __init__(self) -> None:
        self.lives: dict[str, int] = defaultdict(int)
        self.images: dict[str, int] = defaultdict(int)
        self.open: dict[int, Question] = {}  # by connection
        # (reason, whether it was the last word)
        self.ended: dict[Ask, list[tuple[str, bool]]] = defaultdict(list)

    def new_life(self, uid: str) -> None:
        self.lives[uid] += 1

    def pending(
        self,
        uid: str,
        conn: int,
        step: str,
        question: frames.Prepare | frames.Commit,
        wanted: PodAssignment,
        now: float,
    ) -> None:
        """A frame goes out: never for what was given up, as long as the order is the same."""
        digest = question.digest
        image = self.images[digest] if step == "Prepare" else 0
        ask = Ask(
            uid,
            self.lives[uid],
            step,
            digest,
            wanted.token,
            (wanted.rollout, wanted.revision, wanted.memory, wanted.max_pause_seconds),
            image,
        )
        for other, ends in self.ended.items():
            same = other[:2] == ask[:2] and other[3:6] == ask[3:6]
            if same and (other.image == image or other.step == "Commit" or step == "Commit"):
                assert not any(last for _, last in ends), f"{ask} was given up: {ends}"
                assert other.step == "Prepare" or len(ends) < (COMMIT_RETRIES.most or 0), (
                    f"{ask} was given up: {ends}"
                )
        until = now + EngineTimeouts().prepare_seconds
        self.open[conn] = Question(question.id, until, ask)

    def answered(self, conn: int, frame: frames.Frame) -> None:
        """An engine's word reaches the agent."""
        asked = self.open.get(conn)
        if asked is None or getattr(frame, "id", 0) != asked.id:
            return
        match frame:
            case frames.Rejected() | frames.CommitFailed():
                dirty = isinstance(frame, frames.CommitFailed) and frame.dirty
                self.ended[self.open.pop(conn).ask].append(
                    (frame.reason, dirty or frame.reason not in TRANSIENT_FOR_ENGINES)
                )
            case frames.Prepared() | frames.Committed():
                del self.open[conn]

    def closed(self, effect: fx.Close) -> None:
        """The agent has waited long enough for a leader, and never ends a rank for being slow."""
        if effect.conn in self.open and effect.reason.endswith("Timeout"):
            ask = self.open.pop(effect.conn).ask
            assert ask.step == "Commit", f"{effect} ends a rank of an engine that may well serve"
            self.ended[ask].append((effect.reason, False))

    def released(self, conn: int, now: float) -> None:
        """A rank is told to let go of a version: what it did not prepare in time has failed."""
        if conn in self.open and now >= self.open[conn].until:
            self.ended[self.open.pop(conn).ask].append(("PrepareTimeout", False))

    def looked(self, session: Session) -> None:
        """What an engine serves, or has prepared, it did not fail at after all."""
        for engine in session.engines:
            for ask in list(self.ended):
                ready = ask.step == "Prepare" and engine.prepared_everywhere(ask.digest)
                if ask.uid == engine.pod.uid and (ready or ask.digest == engine.confirmed):
                    del self.ended[ask]

    def check(self, session: Session, status: NodeWeightsStatus | None) -> None:
        """A failure that is told did happen, for that order, in this life; and one that happened is
        told.
        """
        for engine in session.engines:
            failed = engine.failed
            if failed is None:
                continue
            # nobody was asked; whether it is true, the world says
            if failed.reason == Reason.NO_GOLDEN_TOKENS:
                assert failed.goal.golden, f"{failed}, which nobody demanded"
                continue
            step = failed.op.capitalize()
            ends = [
                end
                for ask, ends in self.ended.items()
                if (ask.uid, ask.life, ask.step)
                == (engine.pod.uid, self.lives[engine.pod.uid], step)
                and (ask.digest, ask.token) == (failed.goal.digest, failed.goal.token)
                and ask.revision[:2] == (failed.goal.rollout, failed.goal.revision)
                for end in ends
            ]
            assert failed.reason in [reason for reason, _ in ends], f"{failed} never happened"
            assert any(last for _, last in ends) or len(ends) >= (MOST[step] or 0), (
                f"{failed} was not given up: {ends}"
            )
        for one in status.engines if status else ():
            if one.failed is not None:
                assert one.failed.digest != one.digest, (
                    "it serves what it is said to have failed at"
                )
                assert one.failed.step == "Commit" or one.failed.digest != one.prepared, (
                    "it has prepared that one"
                )
            elif one.phase in ("Refused", "Failed", "Dirty"):
                assert one.reason in ("StaleToken", "EngineDirty"), (
                    f"{one.phase} without what it failed at: {one.reason}"
                )
