"""A node in memory: engines that tell the truth about what they serve, an API server that can be
away, a disk; and the session.

Used by the session's tests. Frames lie in queues until a test delivers them, so that anything can
overtake anything.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hotweights_agent.session import effects as fx
from hotweights_agent.session import messages as msg
from hotweights_agent.session.assignments import SavedAssignment
from hotweights_agent.session.session import AgentInfo, Session
from hotweights_crds.nodeweights import (
    EngineStatus,
    NodeWeightsSpec,
    NodeWeightsStatus,
    PodAssignment,
    RolloutAssignment,
    StageItem,
)
from hotweights_transports.handoff import frames
from tests.agent.books import Books


def digest(n: int) -> str:
    """The n-th version's digest; 0 is none."""
    return f"sha256:{str(n) * 64}" if n else ""


def item(n: int, **changes: object) -> StageItem:
    """A stage list's entry for the n-th version."""
    fields: dict[str, object] = {
        "digest": digest(n),
        "namespace": "ns",
        "version": f"v{n}",
        "uri": f"file:///w/v{n}",
    }
    return StageItem.model_validate(fields | changes)


def pod(
    uid: str = "a", version: int = 0, token: int = 1, prepare: int = 0, **changes: object
) -> PodAssignment:
    """What a pod is to serve and to prepare."""
    fields: dict[str, object] = {
        "uid": uid,
        "name": uid,
        "namespace": "ns",
        "token": token,
        "digest": digest(version),
    }
    fields |= {"version": f"v{version}" if version else "", "prepare": digest(prepare)}
    return PodAssignment.model_validate(fields | changes)


KIND = "vllm 0.32.0 cpu float32"


@dataclass
class EngineModel:
    """The truth about one engine: what it serves, and what its processes have at hand."""

    uid: str
    world_size: int
    life: int = 0
    state: str = "Down"  # Down | Booting | Serving | Dirty
    active: int | str = ""  # digest
    token: int = 0
    server: int | None = None  # connection
    ranks: dict[int, int] = field(default_factory=dict)  # rank → connection
    prepared: dict[int, set[str]] = field(default_factory=dict)
    caveat: str = ""
    way: str = "Beside"  # in which it waits for its next commit
    # rank → digest → the life of the agent whose memory of it the rank maps
    maps: dict[int, dict[str, int]] = field(default_factory=dict)
    # frames of the agent, not read yet
    inbox: deque[tuple[int, frames.Frame]] = field(default_factory=deque)
    rejects: set[str] = field(default_factory=set)
    # what the next commits end with: a reason, or "dirty"
    fails: list[str] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)
    kind: str = KIND
    probe: str = "Golden"  # what it says of its next commit
    proved: str = ""  # what it said of the one that it serves


class World:
    """The node. Tests call its verbs; it keeps the books and feeds the session."""

    def __init__(self, reconnect_seconds: float = 0.0) -> None:
        self.now = 0.0
        self.conn = 0
        self.engines: dict[str, EngineModel] = {}
        self.by_conn: dict[int, str] = {}
        self.spec = NodeWeightsSpec()
        self.generation = 0
        self.api_up = True
        self.disk: dict[str, SavedAssignment] = {}
        self.highest: dict[str, int] = {}  # token that the agent has heard, by pod
        self.staged: set[str] = set()
        # digest → the kinds of engine that the version has golden tokens for
        self.golden_kinds: dict[str, frozenset[str]] = {}
        self.fetching: dict[str, StageItem] = {}
        self.wanted_marks: dict[str, fx.PodStatus] = {}
        self.pod_status: dict[str, fx.PodStatus] = {}  # at the API server
        # (pod, life) of those that were shown to serve what they were assigned
        self.in_service: set[tuple[str, int]] = set()
        self.status: NodeWeightsStatus | None = None
        self.log: list[fx.Effect] = []
        self.reconnect_seconds = reconnect_seconds
        self.boots = 0
        self.books = Books()
        self.start_agent()

    # -- the agent ------------------------------------------------------------------------------

    def start_agent(self) -> None:
        """A new agent: memory gone, the disk kept, every connection lost."""
        self.boots += 1
        self.session = Session(
            AgentInfo(f"boot-{self.boots}"), reconnect_seconds=self.reconnect_seconds
        )
        self.staged, self.fetching, self.wanted_marks = set(), {}, {}
        self.by_conn = {}
        self.books.images.clear()
        for engine in self.engines.values():
            self.books.new_life(engine.uid)  # the agent's memory of it is gone
            engine.server, engine.ranks, engine.prepared = None, {}, {}
            engine.inbox.clear()
        self.tell(msg.AssignmentsLoaded(tuple(self.disk.values())))
        self.sync()

    def tell(self, message: msg.Message) -> list[fx.Effect]:
        """Feed the session and do what it wants."""
        if isinstance(message, msg.FrameReceived):
            self.books.answered(message.conn, message.frame)
        effects = self.session.handle(message, msg.Now(self.now, f"t{self.now:g}"))
        self.books.looked(self.session)
        for effect in effects:
            self.perform(effect)
        return effects

    def perform(self, effect: fx.Effect) -> None:
        """Do one effect as the real agent would; check what must hold about it."""
        self.log.append(effect)
        match effect:
            case fx.Stage():
                assert effect.item.digest not in self.fetching, (
                    "a version is fetched once at a time"
                )
                self.fetching[effect.item.digest] = effect.item
            case fx.CancelStage():
                self.fetching.pop(effect.digest, None)
            case fx.ReleaseVersion():
                self.staged.discard(effect.digest)
                assert effect.digest not in self.fetching, (
                    "what is being fetched is cancelled, not released"
                )
            case fx.SendPrepare():
                assert effect.digest in self.staged, (
                    "only what is staged and verified is handed over"
                )
                prepare = frames.Prepare(effect.id, effect.digest, 1)
                self.note_ask(effect.conn, "Prepare", prepare)
                self.send(effect.conn, prepare)
            case fx.Send():
                if isinstance(effect.frame, frames.Commit):
                    self.check_commit(effect.conn, effect.frame)
                elif isinstance(effect.frame, frames.Release):
                    self.books.released(effect.conn, self.now)
                self.send(effect.conn, effect.frame)
            case fx.Close():
                self.books.closed(effect)
                self.lose(effect.conn)
            case fx.Defect():
                raise effect.error
            case fx.SaveAssignments():
                self.disk.update({pod.uid: pod for pod in effect.pods})
            case fx.ForgetPods():
                for uid in effect.pod_uids:
                    self.disk.pop(uid, None)
            case fx.WritePodStatus():
                self.wanted_marks[effect.pod.uid] = effect.pod_status
            case fx.DropPodStatus():
                self.wanted_marks.pop(effect.pod_uid, None)
            case fx.Report():
                self.status = effect.status

    def check_commit(self, conn: int, frame: frames.Commit) -> None:
        """A commit goes out only for what is assigned, to an engine whose every rank has it, with
        no old label showing.
        """
        engine = self.engines[self.by_conn[conn]]
        wanted = self.note_ask(conn, "Commit", frame)
        assert (wanted.digest, wanted.token) == (frame.digest, frame.commit_token)
        assert set(engine.ranks) == set(range(engine.world_size))
        assert all(frame.digest in engine.prepared.get(rank, set()) for rank in engine.ranks), (
            "not every rank has it"
        )
        remembered = self.disk[engine.uid].assignment
        assert remembered.token == frame.commit_token, "the disk knew before the engine"
        assert frame.commit_token >= self.highest.get(engine.uid, 0), (
            "an older assignment undid a newer one"
        )

    def note_ask(
        self, conn: int, step: str, frame: frames.Prepare | frames.Commit
    ) -> PodAssignment:
        uid = self.by_conn[conn]
        wanted = self.session.assignment(uid)
        assert wanted is not None
        self.books.pending(uid, conn, step, frame, wanted, self.now)
        return wanted

    def write_marks(self) -> None:
        """What the pod writer does: bring the API server's pods to what is wanted, and say so."""
        if not self.api_up:
            return
        for uid, pod_status in list(self.wanted_marks.items()):
            if self.pod_status.get(uid) != pod_status:
                self.pod_status[uid] = pod_status
                self.tell(msg.PodStatusSeen(uid, pod_status.digest_label))

    def sync(self) -> None:
        """The watch: what the API server says, or that it says nothing."""
        for pod in (p for r in self.spec.rollouts for p in r.pods) if self.api_up else ():
            self.highest[pod.uid] = max(pod.token, self.highest.get(pod.uid, 0))
        self.tell(msg.Assigned(self.spec, self.generation) if self.api_up else msg.ApiUnavailable())
        if self.api_up:
            for uid, pod_status in list(self.pod_status.items()):
                self.tell(msg.PodStatusSeen(uid, pod_status.digest_label))
            self.write_marks()

    def assign(self, pods: list[PodAssignment], stage: list[StageItem]) -> None:
        """The operator writes; a reachable agent hears it."""
        self.spec = NodeWeightsSpec(rollouts=[RolloutAssignment(uid="r", stage=stage, pods=pods)])
        self.generation += 1
        if self.api_up:
            self.sync()

    def finish_stage(self, name: str, reason: str = "", transient: bool = True) -> None:
        """A fetch ends, well or with a reason."""
        if self.fetching.pop(name, None) is None:
            return
        if reason:
            self.tell(msg.StageFailed(name, reason, "it went wrong", transient))
        else:
            self.staged.add(name)
            self.books.images[name] += 1
            kinds = self.golden_kinds.get(name, frozenset())
            self.tell(msg.StageDone(name, f"v{name[-1]}", 100, 100, 1.0, golden_kinds=kinds))

    def pass_time(self, seconds: float) -> None:
        """Time passes and the clock ticks."""
        self.write_marks()
        self.now += seconds
        self.tell(msg.Ticked())

    # -- engines --------------------------------------------------------------------------------

    def boot(self, uid: str, world_size: int = 1) -> EngineModel:
        """A container starts, or starts again: what it was is gone."""
        engine = self.engines.setdefault(uid, EngineModel(uid, world_size))
        self.kill(uid)
        engine.life += 1
        engine.state, engine.active, engine.token, engine.world_size = "Booting", "", 0, world_size
        engine.proved = ""
        engine.maps = {rank: {} for rank in range(world_size)}
        self.connect(uid)
        return engine

    def connect(self, uid: str) -> None:
        """The processes of a living engine say hello."""
        engine = self.engines[uid]
        for rank in range(engine.world_size):
            if rank not in engine.ranks:
                engine.ranks[rank] = self.new_conn(uid)
                engine.prepared[rank] = set()
                self.hello(engine, engine.ranks[rank], "rank", rank)
        if engine.server is None:
            engine.server = self.new_conn(uid)
            self.hello(engine, engine.server, "server", 0)

    def hello(self, engine: EngineModel, conn: int, role: str, rank: int) -> None:
        if role == "server" and engine.state == "Booting":
            self.books.new_life(engine.uid)
        hello = frames.Hello(
            role=role,
            rank=rank,
            world_size=engine.world_size,
            state=engine.state,
            digest=str(engine.active) or None,
            commit_token=engine.token,
            held=list(engine.maps[rank]) if role == "rank" else [],
            engine=engine.kind,
            probe=engine.proved if role == "server" else "",
            caveat=engine.caveat if role == "server" else "",
        )
        self.tell(msg.Connected(conn, msg.Pod(engine.uid, "ns", engine.uid), hello))

    def new_conn(self, uid: str) -> int:
        self.conn += 1
        self.by_conn[self.conn] = uid
        return self.conn

    def kill(self, uid: str) -> None:
        """Every process of the engine dies."""
        engine = self.engines[uid]
        engine.state, engine.active = "Down", ""
        for conn in [c for c in (engine.server, *engine.ranks.values()) if c is not None]:
            self.lose(conn)
            self.tell(msg.Disconnected(conn))

    def lose(self, conn: int) -> None:
        """A connection ends."""
        engine = self.engines[self.by_conn.pop(conn, "")] if conn in self.by_conn else None
        if engine is None:
            return
        if engine.server == conn:
            engine.server = None
        for rank in [r for r, c in engine.ranks.items() if c == conn]:
            del engine.ranks[rank], engine.prepared[rank]
        engine.inbox = deque((c, f) for c, f in engine.inbox if c != conn)
        if engine.server is None and not engine.ranks:
            self.books.new_life(engine.uid)

    def send(self, conn: int, frame: frames.Frame) -> None:
        if conn in self.by_conn:
            self.engines[self.by_conn[conn]].inbox.append((conn, frame))

    def read(self, uid: str) -> None:
        """The engine reads its next frame and answers."""
        engine = self.engines[uid]
        if engine.inbox and engine.state != "Down":
            conn, frame = engine.inbox.popleft()
            answer = self.answer(engine, conn, frame)
            self.check()  # also before the agent hears of it
            if answer is not None:
                self.tell(msg.FrameReceived(conn, answer))
                self.check()

    def answer(self, engine: EngineModel, conn: int, frame: frames.Frame) -> frames.Frame | None:
        rank = next((r for r, c in engine.ranks.items() if c == conn), None)
        match frame:
            case frames.Prepare() if rank is not None:
                if frame.digest in engine.rejects:
                    return frames.Rejected(frame.id, frame.digest, "ShapeMismatch", "no")
                engine.prepared[rank].add(frame.digest)
                engine.maps[rank][frame.digest] = self.boots
                return frames.Prepared(frame.id, frame.digest, 0.1, 100, engine.way)
            case frames.Release() if rank is not None:
                engine.prepared[rank].discard(frame.digest)
                assert frame.digest != engine.active, "what serves is the way back of a switch"
                engine.maps[rank].pop(frame.digest, None)
                return frames.Released(frame.id, frame.digest)
            case frames.Keep():
                engine.state = "Serving" if engine.state == "Booting" else engine.state
                return frames.Kept(frame.id, frame.commit_token)
            case frames.Commit():
                return self.commit(engine, frame)
        return None

    def commit(self, engine: EngineModel, frame: frames.Commit) -> frames.Frame:
        def failed(reason: str, dirty: bool = False) -> frames.Frame:
            return frames.CommitFailed(
                frame.id, frame.digest, frame.commit_token, reason, "no", dirty
            )

        if frame.commit_token < engine.token:
            return failed("StaleToken")
        engine.token = frame.commit_token
        if engine.active != frame.digest:
            if any(frame.digest not in prepared for prepared in engine.prepared.values()):
                return failed("NotPrepared")
            fault = engine.fails.pop(0) if engine.fails else ""
            if fault == "dirty":
                engine.state, engine.active = "Dirty", ""
                return failed("CommitFailed", dirty=True)
            if fault:
                return failed(fault)
            engine.commits.append(frame.digest)
            engine.proved = engine.probe
        engine.state, engine.active = "Serving", frame.digest
        return frames.Committed(frame.id, frame.digest, frame.commit_token, 0.05, {}, engine.proved)

    # -- what must always hold ------------------------------------------------------------------

    def check(self) -> None:
        """Nothing is said of an engine that is not so."""
        self.books.check(self.session, self.status)
        held = {s.digest for s in self.session.versions.status() if s.phase == "Staged"}
        assert held == self.staged, "the node holds what the session believes it holds"
        for engine in self.session.engines:
            if engine.confirmed:
                assert engine.confirmed == self.engines[engine.pod.uid].active, "a false commit"
            failed, truth = engine.failed, self.engines.get(engine.pod.uid)
            if failed is not None and truth is not None and failed.reason == "NoGoldenTokens":
                kinds = self.golden_kinds.get(failed.goal.digest, frozenset())
                assert truth.kind not in kinds, "it has golden tokens for this kind"
            if engine.probe:
                assert engine.probe == self.engines[engine.pod.uid].proved, "a false proof"
                assert engine.confirmed, "a proof of nothing"
        for uid, pod_status in self.pod_status.items() if self.api_up else ():
            truth = self.engines.get(uid)
            if truth is None or truth.state != "Serving":
                continue
            assert pod_status.digest_label in ("", str(truth.active)[7:23]), (
                "a pod is shown on what it does not serve"
            )
            wanted = self.session.assignment(uid)
            if pod_status.gate and wanted is not None and self.wanted_marks.get(uid) == pod_status:
                if wanted.digest in ("", truth.active):
                    self.in_service.add((uid, truth.life))
                else:
                    assert wanted.mode == "Keep", "the pause may be long, and requests still come"
                    assert truth.active or (uid, truth.life) in self.in_service, (
                        "the gate opened before it served what it was assigned"
                    )

    def settle(self, rounds: int = 60) -> None:
        """Faults are over: everybody answers and time passes."""
        for _ in range(rounds):
            for uid, engine in self.engines.items():
                if engine.state != "Down":
                    self.connect(uid)
                while engine.inbox:
                    self.read(uid)
            for name in list(self.fetching):
                self.finish_stage(name)
            self.write_marks()
            self.pass_time(1.0)
            self.check()


def engine_of(world: World, uid: str = "a") -> EngineStatus:
    """What the node's object says of an engine."""
    assert world.status is not None
    return next(e for e in world.status.engines if e.pod_uid == uid)
