"""One engine: the processes of one pod that are connected, what each has said, and what was asked
of it and not answered.

An engine is a leader (the API server process that commits) and one rank for each worker. This
module keeps the facts and is the only one that may say what the engine *confirmed*: `confirmed`
comes from the leader's own words in its present life, never from what was asked of it, and is
withheld while a commit is under way, while the engine is dirty and while a rank is missing. It
refuses to know what the engine ought to do; that is `next_effects`.

Answers count only when they carry the id of the open question and repeat what was asked. An answer
to another question is ignored; one that names another version or commit than was asked for, and a
frame that nobody expects, end the connection.

What was given up (`failed`, and the tries in `attempts`) belongs to a life: it goes when the engine
boots, when its last process goes, and for a version that it serves after all.
"""

from __future__ import annotations

from collections import deque

from hotweights_agent.session.connections import (
    Attempt,
    PendingRequest,
    ProtocolViolation,
    Rank,
    Server,
    StepFailure,
    probe_strength,
)
from hotweights_agent.session.messages import Now, Pod
from hotweights_agent.session.phases import Happening, Phase, after
from hotweights_common.reasons import Reason
from hotweights_common.sanitize import clip, finite, is_digest, reason_or
from hotweights_crds.nodeweights import ProbeStrength
from hotweights_transports.handoff import frames
from hotweights_transports.handoff.frames import Hello

# more ranks than any engine has: such a hello is a mistake
MAX_WORLD = 4096
# a rank maps what it serves, what it served before, and what it has prepared: more is a mistake, and
# each may cost a frame
MAX_HELD = 16
STORY_EVENTS = 10
"""What is told of an engine when a defect has cost it: enough to see how it came there, and it fits
on a screen.
"""

_FOUND = {
    "Booting": Happening.FOUND_BOOTING,
    "Serving": Happening.FOUND_SERVING,
    "Dirty": Happening.FOUND_DIRTY,
}
"""What a leader's own word for its state means."""

# from the shortest pause to the longest
_WAYS = {way: place for place, way in enumerate(("Beside", "Host", "InPause", "Reload"))}


class Engine:
    """What is known of one pod's engine."""

    def __init__(self, pod: Pod) -> None:
        self.pod = pod
        self.phase = Phase.DISCONNECTED
        self.servers: dict[int, Server] = {}
        self.ranks: dict[int, Rank] = {}
        self.attempts: dict[tuple[str, str], Attempt] = {}  # (prepare | commit, digest) → its tries
        self.failed: StepFailure | None = None  # what it gave up last
        self.pause_seconds = 0.0
        self.seen = False  # it was complete, or began to boot, in the agent's present life
        # since when a commit waits for the pod's label to go
        self.label_gone_since: float | None = None
        self.in_service = False  # its pod's gate was last told to be open
        # what happened last, in words of ours alone
        self.story: deque[str] = deque(maxlen=STORY_EVENTS)

    @property
    def leader(self) -> Server | None:
        """The API server that commits: the one that has been connected longest (numbers of
        connections grow). None: no server is connected.
        """
        return self.servers[min(self.servers)] if self.servers else None

    @property
    def connected(self) -> bool:
        """Whether any process of it is."""
        return bool(self.servers or self.ranks)

    @property
    def booting(self) -> bool:
        """Whether it has answered no request yet in its present life, as far as is known."""
        return self.leader is None or not self.leader.opened

    @property
    def conns(self) -> list[int]:
        return [*self.servers, *(rank.conn for rank in self.ranks.values())]

    @property
    def world_size(self) -> int:
        """How many ranks it has; 0 while their words differ or none is there."""
        sizes = {rank.world_size for rank in self.ranks.values()}
        return sizes.pop() if len(sizes) == 1 else 0

    @property
    def complete(self) -> bool:
        """Whether its leader and every rank are connected."""
        return self.leader is not None and 0 < self.world_size == len(self.ranks)

    @property
    def confirmed(self) -> str:
        """The version that it serves, by its own word in its present life; empty: what it booted,
        or not known now.
        """
        leader = self.leader
        settled = (
            leader is not None and leader.state == "Serving" and self.phase is not Phase.COMMITTING
        )
        return leader.digest if leader is not None and settled and self.complete else ""

    @property
    def probe(self) -> ProbeStrength:
        """What proved `confirmed`, by the engine's own word for that version; empty: nothing is
        confirmed, or a plugin older than this word has not said.
        """
        return self.leader.probe if self.leader is not None and self.confirmed else ""

    @property
    def unsupported(self) -> str:
        """Why it can never be switched, by the word of any of its processes."""
        said = [process.unsupported for process in self.servers.values()]
        said += [process.unsupported for process in self.ranks.values()]
        return next(filter(None, said), "")

    def prepared_everywhere(self, digest: str) -> bool:
        """Whether every rank has it at hand."""
        return self.complete and all(digest in rank.prepared for rank in self.ranks.values())

    @property
    def prepared(self) -> str:
        """A version that every rank has prepared and that is not the one served."""
        at_hand = (
            set[str].intersection(*(set(r.prepared) for r in self.ranks.values()))
            if self.complete
            else set[str]()
        )
        # in the middle of a switch too, when nothing is confirmed
        serves = self.leader.digest if self.leader is not None else ""
        # where there are several, always the same one, so that the status stands still
        return min(at_hand - {serves}, default="")

    @property
    def way(self) -> str:
        """How the prepared version waits for its commit; of several ranks the one with the longest
        pause. Empty: none has, or it was prepared before this agent looked.
        """
        ways = {
            way for digest, way in (r.way for r in self.ranks.values()) if digest == self.prepared
        }
        return max(ways & _WAYS.keys(), key=lambda way: _WAYS[way], default="")

    def happens(self, what: Happening) -> None:
        """Change the phase. Raises `IllegalMove` when that cannot happen in the present one."""
        self.phase = after(self.phase, what)

    # -- connections ----------------------------------------------------------------------------

    def connect(self, conn: int, hello: Hello, now: Now) -> list[int]:
        """A process of it has come; gives the connections that it replaces. Raises
        `ProtocolViolation`.
        """
        if hello.role == "server":
            return self._connect_server(conn, hello, now)
        if hello.role != "rank":
            raise ProtocolViolation(
                Reason.PROTOCOL_UNSUPPORTED,
                f"a hello's role is server or rank, not {clip(hello.role, 32)}",
            )
        if not 0 <= hello.rank < hello.world_size <= MAX_WORLD:
            raise ProtocolViolation(
                Reason.PROTOCOL_UNSUPPORTED, f"rank {hello.rank} of {hello.world_size} cannot be"
            )
        # a rank of another world size belongs to a run of the container that has ended
        replaced = [
            old.conn
            for old in self.ranks.values()
            if old.rank == hello.rank or old.world_size != hello.world_size
        ]
        for old in replaced:
            self._drop_rank(old)
        rank = self.ranks[hello.rank] = Rank(conn, hello.rank, hello.world_size)
        rank.unsupported = clip(hello.unsupported, 400)  # it becomes a part of a status
        rank.held = set(filter(is_digest, hello.held[:MAX_HELD]))
        self.seen = self.seen or self.complete
        if self.phase is Phase.DISCONNECTED:
            self.happens(Happening.RANKS_ALONE)
        return replaced

    def _connect_server(self, conn: int, hello: Hello, now: Now) -> list[int]:
        if hello.state not in ("Booting", "Serving", "Dirty"):
            raise ProtocolViolation(
                Reason.PROTOCOL_UNSUPPORTED, f"a hello's state is never {clip(hello.state, 32)}"
            )
        digest = hello.digest or ""
        if digest and not is_digest(digest):
            raise ProtocolViolation(
                Reason.PROTOCOL_UNSUPPORTED, "a hello's digest is sha256: and 64 hexadecimal digits"
            )
        if hello.state == "Booting" and self.servers:
            self._doubt()
        if hello.state == "Booting":
            self._forget_failures()
        self.servers[conn] = Server(
            conn,
            hello.state,
            digest,
            hello.commit_token,
            hello.state != "Booting",
            now.utc if digest else "",
            unsupported=clip(hello.unsupported, 400),
            caveat=clip(hello.caveat, 400),
            kind=clip(hello.engine, 128),  # as long as a manifest's may be
            probe=probe_strength(hello.probe) if digest else "",
        )
        # one that boots is certain to serve nothing, whoever else has not come back yet
        self.seen = self.seen or self.complete or hello.state == "Booting"
        if len(self.servers) == 1:  # the phase follows the leader, and later servers do not lead
            self.happens(_FOUND[hello.state])
        return []

    def _doubt(self) -> None:
        """A port opens anew beside others: perhaps the container restarted unseen, so what was
        confirmed is asked again.
        """
        for server in self.servers.values():
            server.digest, server.confirmed_at, server.probe = "", "", ""

    def gone(self, conn: int) -> None:
        """A process of it has gone; what it had confirmed or prepared went with it."""
        leader = self.leader
        if leader is not None and conn == leader.conn:
            del self.servers[conn]
            self._leaderless()
        elif conn in self.servers:
            del self.servers[conn]
        else:
            self._drop_rank(conn)
        if not self.connected:
            self._forget_failures()
            self.happens(Happening.LEFT)

    def _forget_failures(self) -> None:
        self.attempts, self.failed = {}, None

    def serves_after_all(self) -> None:
        """What it confirmed was not given up, whatever was thought of it before."""
        for op in ("prepare", "commit") if self.confirmed else ():
            self._succeeded(op, self.confirmed)

    def _succeeded(self, op: str, digest: str) -> None:
        self.attempts.pop((op, digest), None)
        if self.failed is not None and self.failed.goal.digest == digest:
            self.failed = None

    def _leaderless(self) -> None:
        """The one that confirmed is gone: the next one's own word counts, else the engine boots
        again.
        """
        self.pause_seconds, self.label_gone_since, self.in_service = 0.0, None, False
        # by this way first: it is open from every phase, also from the middle of a commit
        self.happens(Happening.LEFT)
        heir = self.leader
        if heir is not None:
            self.happens(_FOUND[heir.state])
        elif self.ranks:
            self.happens(Happening.RANKS_ALONE)

    def _drop_rank(self, conn: int) -> None:
        number = next((n for n, rank in self.ranks.items() if rank.conn == conn), None)
        if number is None:  # another connection has taken its place
            return
        del self.ranks[number]
        # not from Committing: how that ends is for the leader to say
        if self.phase in (Phase.PREPARED, Phase.PREPARING):
            self.rest()

    def rest(self) -> None:
        """Back to what it does when nothing is asked of it."""
        leader = self.leader
        booting = leader is None or leader.state == "Booting"
        self.happens(Happening.IDLE_AT_BOOT if booting else Happening.IDLE)

    # -- what processes say ---------------------------------------------------------------------

    def said(self, conn: int, frame: frames.Frame, now: Now) -> StepFailure | None:
        """Take note of a frame; gives what it says has failed. Raises `ProtocolViolation`, and then
        nothing has changed.
        """
        server = self.servers.get(conn)
        rank = next((r for r in self.ranks.values() if r.conn == conn), None)
        match frame:
            case frames.Prepared() | frames.Rejected() if rank is not None:
                return self._prepare_answered(rank, frame)
            case frames.Committed() | frames.CommitFailed() if server is not None:
                return self._commit_answered(server, frame, now)
            case frames.Kept() if server is not None and _answers(frame.id, "keep", server.pending):
                server.pending, server.state, server.opened = None, "Serving", True
                if server is self.leader:
                    self.label_gone_since = None
                    if self.phase is Phase.BOOTING:
                        self.happens(Happening.FOUND_SERVING)
            case frames.State() if server is not None:
                self._state_told(server, frame, now)
            # a `Kept` that comes here answers no open question
            case frames.Released() | frames.Pong() | frames.Ping() | frames.Kept():
                pass
            case _:
                role = "server" if server is not None else "rank"
                raise ProtocolViolation(
                    Reason.PROTOCOL_UNSUPPORTED, f"a {role} does not send {frame.op}"
                )
        return None

    def _prepare_answered(
        self, rank: Rank, frame: frames.Prepared | frames.Rejected
    ) -> StepFailure | None:
        asked = rank.pending
        if asked is None or not (
            _answers(frame.id, "prepare", asked) or _answers(frame.id, "map", asked)
        ):  # of another question
            return None
        if frame.digest != asked.goal.digest:
            raise ProtocolViolation(
                Reason.PROTOCOL_UNSUPPORTED,
                f"rank {rank.rank} answered for another version than asked",
            )
        rank.pending = None
        if rank.called_off == asked.id:  # the order to release it is behind the question
            return None
        if isinstance(frame, frames.Prepared):
            rank.prepared[frame.digest] = asked.goal.wish
            rank.way = (frame.digest, frame.way)
            rank.held.discard(frame.digest)  # the rank let go of the older mapping
            if self.prepared_everywhere(frame.digest):
                self._succeeded("prepare", frame.digest)
            return None
        rank.rejected[frame.digest] = asked.goal
        if asked.op == "map":  # it keeps what it maps, and serves as before: nothing has failed
            return None
        # 512, here and below: what the status takes of a message
        message = clip(f"rank {rank.rank}: {frame.message}", 512)
        return StepFailure(
            "prepare",
            asked.goal,
            reason_or(frame.reason, "Rejected"),
            message,
            booting=self.booting,
        )

    def _commit_answered(
        self, server: Server, frame: frames.Committed | frames.CommitFailed, now: Now
    ) -> StepFailure | None:
        asked = server.pending
        if asked is None or not _answers(frame.id, "commit", asked):  # of another question
            return None
        if (frame.digest, frame.commit_token) != (asked.goal.digest, asked.goal.token):
            raise ProtocolViolation(
                Reason.PROTOCOL_UNSUPPORTED,
                "the engine answered another commit than the one asked for",
            )
        # the news that it is dirty may come before the answer that does not say so
        dirty = isinstance(frame, frames.CommitFailed) and (frame.dirty or server.state == "Dirty")
        booting = self.booting
        if server is self.leader:
            if dirty:
                self.happens(Happening.COMMIT_BROKE)
            elif isinstance(frame, frames.CommitFailed):
                self.happens(Happening.COMMIT_FAILED)
            else:
                self.happens(Happening.COMMITTED)
        server.pending, server.token = None, max(server.token, frame.commit_token)
        if isinstance(frame, frames.Committed):
            server.state, server.digest, server.confirmed_at = "Serving", frame.digest, now.utc
            server.opened, server.probe = True, probe_strength(frame.probe)
            server.reason = server.message = ""
            self.pause_seconds, self.label_gone_since = finite(frame.pause_seconds), None
            return None
        reason, message = reason_or(frame.reason, Reason.COMMIT_FAILED), clip(frame.message, 512)
        if dirty:
            server.state, server.digest, server.confirmed_at = "Dirty", "", ""
            server.probe = ""
            server.reason, server.message = reason, message
        if (
            reason == Reason.NOT_PREPARED
        ):  # the ranks lost it: it is prepared anew before the next try
            for rank in self.ranks.values():
                rank.prepared.pop(frame.digest, None)
        return StepFailure("commit", asked.goal, reason, message, dirty, booting)

    def _state_told(self, server: Server, frame: frames.State, now: Now) -> None:
        """Unasked news. While a commit is open only its own answer says what is served."""
        digest = frame.digest or ""
        if frame.state not in ("Booting", "Serving", "Dirty") or (digest and not is_digest(digest)):
            raise ProtocolViolation(
                Reason.PROTOCOL_UNSUPPORTED,
                f"no engine can be {clip(frame.state, 32)} on {clip(digest, 80)}",
            )
        committing = server.pending is not None and server.pending.op == "commit"
        if server is self.leader and not committing:
            self._follow(frame.state)
        server.state, server.opened = frame.state, server.opened or frame.state == "Serving"
        server.token = max(server.token, frame.commit_token)
        server.reason = reason_or(frame.reason, "") if frame.state == "Dirty" else ""
        server.message = clip(frame.message, 512) if frame.state == "Dirty" else ""
        if committing:  # see above
            return
        new = digest if frame.state == "Serving" else ""
        if new != server.digest:  # the same digest keeps the time at which it was confirmed
            server.digest, server.confirmed_at = new, now.utc if new else ""
            server.probe = probe_strength(frame.probe) if new else ""

    def _follow(self, state: str) -> None:
        """Only phases that the leader's state makes follow it; the others follow what is asked."""
        if state == "Dirty" or self.phase in (Phase.DIRTY, Phase.BOOTING):
            self.happens(_FOUND[state])


def _answers(id_: int, op: str, asked: PendingRequest | None) -> bool:
    return asked is not None and asked.op == op and asked.id == id_
