"""Whole lives of a node, drawn at random: the session against engines that know the truth."""

from __future__ import annotations

from typing import Literal

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hotweights_agent.session import effects as fx
from hotweights_agent.session.messages import Disconnected
from hotweights_crds.nodeweights import PodAssignment
from hotweights_transports.handoff import frames
from tests.agent.world import World, digest, item

UIDS = ("a", "b")
VERSIONS = (1, 2, 3)
FAULTS = (
    *(
        "starts",
        "dies",
        "breaks",
        "breaks",
        "commit dirty",
        "commit DrainTimeout",
        "commit ProbeMismatch",
        "rejects",
        "demand",
        "proves Ran",
    ),
    *(
        "fetch SourceNotFound",
        "fetch ChecksumMismatch",
        "silence 40",
        "silence 700",
        "unlist",
        "agent",
        "agent",
        "api",
    ),
)
ROUNDS = st.sampled_from((3, 2, 1, 0))  # how long nothing goes wrong


class Node(RuleBasedStateMachine):
    """Anything may happen in any order; what is said must be true after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.tokens = dict.fromkeys(UIDS, 0)
        self.digests = dict.fromkeys(UIDS, 0)
        self.prepares = dict.fromkeys(UIDS, 0)
        self.max_pause_seconds = 0
        self.mode: Literal["Keep", "Wait"] = "Keep"
        self.golden = 0  # the version that may only be taken with golden tokens, which it has not
        self.revisions = dict.fromkeys(UIDS, 0)
        self.restarts = dict.fromkeys(UIDS, 0)
        self.listed = {1}

    def write(self) -> None:
        """The operator's whole spec."""
        pods = [
            PodAssignment(
                uid=uid,
                name=uid,
                namespace="ns",
                token=self.tokens[uid],
                revision=self.revisions[uid],
                restarts=self.restarts[uid],
                digest=digest(self.digests[uid]),
                prepare=digest(self.prepares[uid]),
                golden=digest(self.golden),
                max_pause_seconds=self.max_pause_seconds,
                mode=self.mode,
                version=f"v{self.digests[uid]}",
            )
            for uid in UIDS
        ]
        self.world.assign(pods, [item(n) for n in sorted(self.listed)])

    @rule(
        uid=st.sampled_from(UIDS),
        version=st.sampled_from((1, 2, 3, 0)),
        prepare=st.sampled_from((0, 2, 3)),
        revised=st.booleans(),
        max_pause_seconds=st.sampled_from((0, 9)),
        mode=st.sampled_from(("Keep", "Wait")),
        rounds=ROUNDS,
    )
    def assign(
        self,
        uid: str,
        version: int,
        prepare: int,
        revised: bool,
        max_pause_seconds: int,
        mode: Literal["Keep", "Wait"],
        rounds: int,
    ) -> None:
        self.mode = mode
        self.max_pause_seconds = max_pause_seconds
        self.listed |= {version, prepare} - {0}
        self.tokens[uid] += 1
        self.revisions[uid] += revised
        self.digests[uid], self.prepares[uid] = version, prepare
        self.write()
        self.world.settle(rounds)

    @rule(uid=st.sampled_from(UIDS), version=st.sampled_from(VERSIONS), rounds=ROUNDS)
    def a_stale_leader_assigns(self, uid: str, version: int, rounds: int) -> None:
        kept = self.tokens[uid], self.digests[uid]
        if kept[0] > 1:
            self.tokens[uid], self.digests[uid] = kept[0] - 1, version
            self.write()
            self.world.settle(rounds)
            self.tokens[uid], self.digests[uid] = kept

    @rule(
        uid=st.sampled_from(UIDS),
        what=st.sampled_from(("revision", "revision", "restarts")),
        rounds=ROUNDS,
    )
    def only_a_number_changes(self, uid: str, what: str, rounds: int) -> None:
        """What an engine gave up is tried again in another revision; one that serves what it is
        told is left alone.
        """
        self.write()
        shown, told = self.world.wanted_marks.get(uid), len(self.world.log)
        numbers = self.revisions if what == "revision" else self.restarts
        numbers[uid] += 1
        self.write()
        if shown is not None and shown.reason == "Assigned":
            assert self.world.wanted_marks[uid] == shown
            assert not [
                e
                for e in self.world.log[told:]
                if isinstance(e, fx.Send) and isinstance(e.frame, frames.Commit)
            ]
        self.world.settle(rounds)

    @initialize(sizes=st.tuples(st.sampled_from((1, 2)), st.sampled_from((1, 2))))
    def containers_start(self, sizes: tuple[int, int]) -> None:
        for uid, size in zip(UIDS, sizes, strict=True):
            self.world.boot(uid, size)

    @rule(
        uid=st.sampled_from(UIDS),
        fault=st.sampled_from(FAULTS),
        which=st.integers(0, 3),
        rounds=ROUNDS,
    )
    def something_goes_wrong(self, uid: str, fault: str, which: int, rounds: int) -> None:
        world, engine = self.world, self.world.engines[uid]
        match fault.split():
            case ["starts"]:
                world.boot(uid, engine.world_size)
            case ["dies"]:
                world.kill(uid)
            case ["breaks"]:
                conns = [c for c, owner in world.by_conn.items() if owner == uid]
                for conn in conns[which : which + 1]:
                    world.lose(conn)
                    world.tell(Disconnected(conn))
            case ["commit", reason]:
                engine.fails = [reason]
            case ["rejects"]:
                engine.rejects ^= {digest(VERSIONS[which % 3])}
            case ["demand"]:  # of versions without golden tokens, or no more
                self.golden = 0 if self.golden else VERSIONS[which % 3]
                self.write()
            case ["proves", probe]:
                engine.probe = probe
            case ["fetch", reason] if world.fetching:
                world.finish_stage(
                    min(world.fetching), reason, transient=reason != "ChecksumMismatch"
                )
            case ["silence", seconds]:
                world.pass_time(float(seconds))
            case ["unlist"]:
                self.listed -= {VERSIONS[which % 3]}
                self.write()
            case ["agent"]:
                world.start_agent()
            case ["api"]:
                world.api_up = not world.api_up
                world.sync()
        world.check()
        world.settle(rounds)

    @rule(
        moves=st.lists(
            st.sampled_from(("fetch", "read a", "read b", "write", "wait", "hello")), max_size=30
        )
    )
    def time_passes(self, moves: list[str]) -> None:
        """Nothing goes wrong for a while; who comes first is left open."""
        for move in moves:
            match move.split():
                case ["fetch"] if self.world.fetching:
                    self.world.finish_stage(min(self.world.fetching))
                case ["read", uid]:
                    self.world.read(uid)
                case ["write"]:
                    self.world.write_marks()
                case ["wait"]:
                    self.world.pass_time(0.5)
                case ["hello"]:
                    for uid in UIDS:
                        if self.world.engines[uid].state != "Down":
                            self.world.connect(uid)
            self.world.check()

    @invariant()
    def nothing_false_is_said(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        """When the faults end, every engine that can comes to serve what it is assigned."""
        world = self.world
        world.api_up = True
        self.golden = 0
        for uid in UIDS:
            self.tokens[uid] += 1  # the operator's answer to whatever had been given up
            self.listed |= {self.digests[uid], self.prepares[uid]} - {0}
        # an operator stages what its pods serve, also where nobody chose it
        served = {engine.active for engine in world.engines.values()}
        self.listed |= {number for number in VERSIONS if digest(number) in served}
        for engine in world.engines.values():
            engine.rejects, engine.fails = set(), []
            if engine.state == "Dirty":
                world.boot(engine.uid)  # the plugin ends a process that it cannot repair
        self.write()
        world.sync()
        for name in list(world.fetching):
            world.finish_stage(name)
        world.start_agent()  # versions that had failed for good are tried again after a restart
        world.settle()
        for uid, engine in world.engines.items():
            if engine.state != "Down":
                assert engine.state == "Serving"
                assert not self.digests[uid] or engine.active == digest(self.digests[uid])
                assert world.pod_status[uid].gate
                lives = {life for held in engine.maps.values() for life in held.values()}
                assert lives <= {world.boots}, "it maps memory that no agent can reach"


TestNode = Node.TestCase
TestNode.settings = settings(
    max_examples=30, stateful_step_count=25, suppress_health_check=list(HealthCheck)
)
