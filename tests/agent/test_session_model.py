"""Whole lives of a node, drawn at random: the session against engines that know the truth."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hotweights_agent.messages import Gone
from hotweights_crds.nodeweights import PodAssignment
from tests.agent.world import World, digest, item

UIDS = ("a", "b")
VERSIONS = (1, 2, 3)


class Node(RuleBasedStateMachine):
    """Anything may happen in any order; what is said must be true after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.tokens = dict.fromkeys(UIDS, 0)
        self.digests = dict.fromkeys(UIDS, 0)
        self.prepares = dict.fromkeys(UIDS, 0)
        self.listed = {1}

    def write(self) -> None:
        """The operator's whole spec."""
        pods = [
            PodAssignment(
                uid=uid,
                name=uid,
                namespace="ns",
                token=self.tokens[uid],
                digest=digest(self.digests[uid]),
                prepare=digest(self.prepares[uid]),
                version=f"v{self.digests[uid]}",
            )
            for uid in UIDS
        ]
        self.world.assign(pods, [item(n) for n in sorted(self.listed)])

    @rule(uid=st.sampled_from(UIDS), version=st.sampled_from((0, *VERSIONS)), older=st.booleans())
    def assign(self, uid: str, version: int, older: bool) -> None:
        self.listed |= {version} - {0}
        if older and self.tokens[uid] > 1:  # a stale leader's write
            kept = self.tokens[uid], self.digests[uid]
            self.tokens[uid], self.digests[uid] = kept[0] - 1, version
            self.write()
            self.tokens[uid], self.digests[uid] = kept
            return
        self.tokens[uid] += 1
        self.digests[uid] = version
        self.write()

    @rule(uid=st.sampled_from(UIDS), version=st.sampled_from((0, *VERSIONS)))
    def prepare(self, uid: str, version: int) -> None:
        self.listed |= {version} - {0}
        self.tokens[uid] += 1
        self.prepares[uid] = version
        self.write()

    @rule(version=st.sampled_from(VERSIONS))
    def unlist(self, version: int) -> None:
        self.listed -= {version}
        self.write()

    @initialize(sizes=st.tuples(st.sampled_from((1, 2)), st.sampled_from((1, 2))))
    def containers_start(self, sizes: tuple[int, int]) -> None:
        for uid, size in zip(UIDS, sizes, strict=True):
            self.world.boot(uid, size)

    @rule(uid=st.sampled_from(UIDS), how=st.sampled_from(("starts again", "dies", "reconnects")))
    def container(self, uid: str, how: str) -> None:
        engine = self.world.engines[uid]
        if how == "dies":
            self.world.kill(uid)
        elif how == "starts again" or engine.state == "Down":
            self.world.boot(uid, engine.world_size)
        else:
            self.world.connect(uid)

    @rule(uid=st.sampled_from(UIDS), which=st.integers(0, 3))
    def connection_breaks(self, uid: str, which: int) -> None:
        conns = [c for c, owner in self.world.by_conn.items() if owner == uid]
        if conns:
            conn = conns[which % len(conns)]
            self.world.lose(conn)
            self.world.tell(Gone(conn))

    @rule(uid=st.sampled_from(UIDS), fault=st.sampled_from(("dirty", "DrainTimeout", "ProbeMismatch", "reject")))
    def engine_will_fail(self, uid: str, fault: str) -> None:
        engine = self.world.engines[uid]
        if fault == "reject":
            engine.rejects ^= {digest(self.digests[uid])}
        else:
            engine.fails = [fault]

    @precondition(lambda self: self.world.fetching)
    @rule(reason=st.sampled_from(("SourceNotFound", "ChecksumMismatch")))
    def fetch_fails(self, reason: str) -> None:
        self.world.finish_stage(min(self.world.fetching), reason, transient=reason != "ChecksumMismatch")

    @rule(moves=st.lists(st.sampled_from(("fetch", "read a", "read b", "write", "wait", "hello")), max_size=30))
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

    @rule(rounds=st.integers(1, 6))
    def all_goes_well(self, rounds: int) -> None:
        self.world.settle(rounds)

    @rule(seconds=st.sampled_from((5.0, 40.0, 700.0)))
    def much_time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule()
    def agent_restarts(self) -> None:
        self.world.start_agent()

    @rule()
    def api_server_goes_or_comes(self) -> None:
        self.world.api_up = not self.world.api_up
        self.world.sync()

    @invariant()
    def nothing_false_is_said(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        """When the faults end, every engine that can comes to serve what it is assigned."""
        world = self.world
        world.api_up = True
        for uid in UIDS:
            self.tokens[uid] += 1  # the operator's answer to whatever had been given up
            self.listed |= {self.digests[uid], self.prepares[uid]} - {0}
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
                assert world.marks[uid].gate


TestNode = Node.TestCase
TestNode.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
