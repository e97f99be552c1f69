"""What an engine is to be asked next, so that it comes to serve what its pod is assigned.

By level and one step at a time: nothing is remembered here, `next_effects` looks at the facts of an
`Engine`, its assignment and what the node holds, and says which frames go out now. The order is
always the same: a rank is handed a version once it is staged; the pod's label goes before the
switch begins, so that no pod is ever shown on a version that it no longer serves; the leader is
told to commit once every rank is prepared. What becomes of a question without an answer is told in
`timeouts`.

A rank keeps what it serves mapped, so that a broken switch can be repaired. After a restart of the
agent that may be memory of the former life, which nobody else can reach: when nothing else is asked
of the engine, its ranks are handed what they serve once more, as it lies here now, and let the old
memory go.

What was given up stays so for that very order: the assignment's token, rollout and revision, and
the version's image. Meanwhile the engine makes ready what comes next.

A version that may only be taken with golden tokens, and has none for this kind of engine, is given
up before a rank is asked: the manifest and the engine's hello say all that it takes to know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hotweights_agent.session.connections import (
    Attempt,
    Goal,
    PendingRequest,
    Rank,
    Server,
    StepFailure,
    Wish,
)
from hotweights_agent.session.effects import Effect, Send, SendPrepare
from hotweights_agent.session.engine import Engine
from hotweights_agent.session.phases import Happening, Phase
from hotweights_agent.session.retry import RetryState
from hotweights_agent.session.timeouts import (
    EngineTimeouts,
    expire,
    record_failure,
)
from hotweights_agent.session.versions import NodeVersions
from hotweights_common.reasons import Reason
from hotweights_common.sanitize import clip
from hotweights_crds.nodeweights import PodAssignment
from hotweights_transports.handoff import frames

# how long a commit waits for the label to go; while the API server is away nobody reads it anyway
UNMARK_SECONDS = 2.0
MAP_SECONDS = 30.0  # for one mmap(2) and a look at a table; whoever takes longer answers too late


@dataclass(frozen=True, slots=True)
class EngineContext:
    """What decides about an engine beside the engine."""

    assignment: PodAssignment | None  # None: not known
    versions: NodeVersions
    digest_label: str  # what the pod shows at the API server; empty: nothing
    now: float  # seconds of `Now`
    next_id: Callable[[], int]
    bounds: EngineTimeouts


def next_effects(engine: Engine, at: EngineContext) -> list[Effect]:
    """The frames to send now; the engine's facts are brought up to date with them."""
    engine.serves_after_all()
    effects = expire(engine, at.now, at.next_id)
    leader, wanted = engine.leader, at.assignment
    if (
        leader is None
        or wanted is None
        or engine.phase is Phase.DIRTY
        or leader.pending is not None
    ):
        # nobody to ask, nothing to ask for, paused until it repairs itself, or it owes an answer
        return effects
    # the engine would refuse an older order; one that asks for what it serves harms nobody
    if wanted.token < leader.token and not satisfied(engine, wanted):
        engine.happens(Happening.GIVEN_UP)
        return effects
    effects += _release_ports(engine, wanted, at)
    # tries for what is not ordered any more go, so that they do not pile up
    orders = (wanted.digest, wanted.prepare)
    engine.attempts = {key: attempt for key, attempt in engine.attempts.items() if key[1] in orders}
    digest = goal_of(engine, wanted, at.versions)
    effects += _forget_old(engine, {digest or wanted.digest, wanted.prepare, leader.digest}, at)
    if digest:
        goal = goal_for(wanted, digest, at.versions)
        effects += _prepare(engine, goal, at)
        _settle(engine, goal)
    elif leader.pending is None:
        engine.rest()
    # the label's wait is the commit's own from here on
    if digest and digest == wanted.digest and engine.phase is Phase.PREPARED:
        return effects + _commit(engine, leader, wanted, at)
    if leader.state == "Serving":  # no switch waits, so the pod may show its label again
        engine.label_gone_since = None
    return effects + _map_anew(engine, wanted, at)


def satisfied(engine: Engine, wanted: PodAssignment) -> bool:
    """Whether it serves what its pod is assigned, by its own word; an empty digest is whatever it
    serves. The gate of the pod follows it.
    """
    leader = engine.leader
    if leader is None or leader.state != "Serving" or not engine.complete:
        return False
    return engine.phase is not Phase.COMMITTING and wanted.digest in ("", engine.confirmed)


def goal_of(engine: Engine, wanted: PodAssignment, versions: NodeVersions) -> str:
    """The digest that it is to be brought to next; empty: there is none. What was given up makes
    way for what comes next, if that is on the node: the way back must not depend on what failed.
    """
    following = wanted.prepare if wanted.prepare != engine.confirmed else ""
    if not wanted.digest or wanted.digest == engine.confirmed:
        return following
    makes_way = following != wanted.digest and versions.staged(following)
    return (
        following
        if makes_way and given_up(engine, goal_for(wanted, wanted.digest, versions))
        else wanted.digest
    )


def goal_for(wanted: PodAssignment, digest: str, versions: NodeVersions) -> Goal:
    """What is tried for a version of this assignment; the image is 0 while it is not staged."""
    return Goal(
        wanted.token,
        digest,
        versions.image(digest),
        wanted.rollout,
        wanted.revision,
        Wish(wanted.memory, wanted.max_pause_seconds),
        golden=bool(digest) and digest == wanted.golden,
    )


def retry_state(engine: Engine, op: str, goal: Goal) -> RetryState:
    """The tries for this goal; another one starts afresh. ``op`` is prepare or commit."""
    attempt = engine.attempts.get((op, goal.digest))
    if attempt is None or attempt.goal != goal:
        attempt = engine.attempts[op, goal.digest] = Attempt(goal)
    return attempt.retries


def given_up(engine: Engine, goal: Goal) -> RetryState | None:
    """How the tries for this goal ended; None: they did not. A version that is not here (image 0)
    is no other than it was.
    """
    prepare, commit = (
        engine.attempts.get(("prepare", goal.digest)),
        engine.attempts.get(("commit", goal.digest)),
    )
    # the commit first: it comes after a prepare that succeeded
    if commit is not None and commit.retries.given_up and commit.goal == _of_commit(goal):
        return commit.retries
    if prepare is not None and prepare.retries.given_up:
        same = replace(goal, image=prepare.goal.image) if not goal.image else goal
        return prepare.retries if prepare.goal == same else None
    return None


def _of_commit(goal: Goal) -> Goal:
    """A commit takes what the ranks have prepared, whichever image that came from."""
    return replace(goal, image=0)


def _release_ports(engine: Engine, wanted: PodAssignment, at: EngineContext) -> list[Effect]:
    """Let servers open their port: the leader if it is to keep what it booted, the others once the
    leader serves.
    """
    effects: list[Effect] = []
    for server in engine.servers.values():
        if server is engine.leader:
            may_open = not wanted.digest and server.state == "Booting" and _unmarked(engine, at)
        else:
            may_open = satisfied(engine, wanted)
        if server.state == "Booting" and server.pending is None and may_open:
            server.pending = PendingRequest(
                at.next_id(), "keep", Goal(wanted.token, ""), at.now + at.bounds.keep_seconds
            )
            effects.append(
                Send(server.conn, frames.Keep(server.pending.id, max(wanted.token, server.token)))
            )
    return effects


def _forget_old(engine: Engine, kept: set[str], at: EngineContext) -> list[Effect]:
    """Versions at hand that are neither served nor asked for hold memory, those of an agent's
    former life too: ranks may forget them.
    """
    effects: list[Effect] = []
    for rank in engine.ranks.values():
        gone = sorted((rank.prepared.keys() | rank.held) - kept) if rank.pending is None else []
        if (
            rank.pending is not None
            and rank.pending.goal.digest not in kept
            and rank.called_off != rank.pending.id
        ):
            rank.called_off = rank.pending.id  # it need not finish; it answers all the same
            gone = [rank.pending.goal.digest]
        rank.held.difference_update(gone)
        for digest in gone:
            rank.prepared.pop(digest, None)
        effects += [Send(rank.conn, frames.Release(at.next_id(), digest)) for digest in gone]
    return effects


def _unmarked(engine: Engine, at: EngineContext) -> bool:
    """Whether the pod shows no version any more, or the API server had its time to make it so."""
    if engine.label_gone_since is None:
        engine.label_gone_since = at.now
    return not at.digest_label or at.now >= engine.label_gone_since + UNMARK_SECONDS


def _prepare(engine: Engine, goal: Goal, at: EngineContext) -> list[Effect]:
    """Hand the version to every rank that lacks it."""
    # nothing to hand over yet, or not all ranks are there to take it
    if not goal.image or not engine.complete:
        return []
    may_start = (
        retry_state(engine, "prepare", goal).may_start(at.now) and given_up(engine, goal) is None
    )
    if goal.golden and not _can_be_proved(engine, goal, at):
        return _let_go(engine, goal.digest, at)
    return [
        effect
        for rank in engine.ranks.values()
        for effect in _prepare_rank(rank, goal, may_start, at)
    ]


def _can_be_proved(engine: Engine, goal: Goal, at: EngineContext) -> bool:
    """Whether the version has golden tokens for this kind of engine; if not, it is given up."""
    kind = engine.leader.kind if engine.leader is not None else ""
    kinds = at.versions.golden_kinds(goal.digest)
    if kind in kinds:
        return True
    text = (
        f"the version has no golden tokens for {kind or 'an engine that does not say its kind'}, "
        "and activation.probe is Golden: publish it with `hotweights publish --record-probes` on "
        "such an engine, or set activation.probe to Any"
    )
    if kinds:
        text += f"; it has them for {', '.join(sorted(kinds))}"
    failure = StepFailure(
        "prepare", goal, Reason.NO_GOLDEN_TOKENS, clip(text, 512), booting=engine.booting
    )
    record_failure(engine, failure, at.now)
    return False


def _let_go(engine: Engine, digest: str, at: EngineContext) -> list[Effect]:
    """What was prepared before anybody demanded more of it holds memory for nothing."""
    ranks = [rank for rank in engine.ranks.values() if digest in rank.prepared]
    for rank in ranks:
        del rank.prepared[digest]
    return [Send(rank.conn, frames.Release(at.next_id(), digest)) for rank in ranks]


def _prepare_rank(rank: Rank, goal: Goal, may_start: bool, at: EngineContext) -> list[Effect]:
    if may_start or rank.rejected.get(goal.digest) != goal:
        # another assignment, another image, or a passing reason: its wait is over
        rank.rejected.pop(goal.digest, None)
    if rank.prepared.get(goal.digest, goal.wish) != goal.wish:
        # another way is wished for: the rank says at once if the one that it has will do
        del rank.prepared[goal.digest]
    if not may_start or rank.pending is not None or goal.digest in rank.prepared:
        return []
    rank.pending = PendingRequest(at.next_id(), "prepare", goal, at.now + at.bounds.prepare_seconds)
    return [_send_prepare(rank.conn, rank.pending)]


def _map_anew(engine: Engine, wanted: PodAssignment, at: EngineContext) -> list[Effect]:
    """Hand what the engine serves to ranks that map it from before their connection. What it serves
    is the same before, meanwhile and after, whatever they answer; each is asked once for an order
    and an image.
    """
    goal = goal_for(wanted, engine.confirmed, at.versions)
    # one thing at a time: an order that is under way comes first, and frees the old memory as well
    if not goal.image or any(rank.pending for rank in engine.ranks.values()):
        return []
    effects: list[Effect] = []
    for rank in engine.ranks.values():
        if goal.digest in rank.held and rank.rejected.get(goal.digest) != goal:
            deadline = at.now + min(MAP_SECONDS, at.bounds.prepare_seconds)
            rank.pending = PendingRequest(at.next_id(), "map", goal, deadline)
            effects.append(_send_prepare(rank.conn, rank.pending))
    return effects


def _send_prepare(conn: int, asked: PendingRequest) -> SendPrepare:
    goal = asked.goal
    return SendPrepare(
        conn, asked.id, goal.digest, goal.wish.memory, float(goal.wish.max_pause_seconds)
    )


def _settle(engine: Engine, goal: Goal) -> None:
    """The phase that the facts about the goal amount to; a failure that is tried again is none
    yet.
    """
    ranks = engine.ranks.values()
    over = given_up(engine, goal)
    if engine.prepared_everywhere(goal.digest):
        engine.happens(Happening.GIVEN_UP if over else Happening.ALL_PREPARED)
    elif any(rank.pending and rank.pending.op == "prepare" for rank in ranks) or (
        not over and goal.image and retry_state(engine, "prepare", goal).reason
    ):
        engine.happens(Happening.PREPARE_ASKED)
    elif any(goal.digest in rank.rejected for rank in ranks):
        engine.happens(Happening.PREPARE_REFUSED)
    elif over:
        engine.happens(Happening.GIVEN_UP)
    else:
        engine.rest()


def _commit(
    engine: Engine, leader: Server, wanted: PodAssignment, at: EngineContext
) -> list[Effect]:
    """Tell the leader to switch, after the pod's label has gone."""
    if any(rank.pending and rank.pending.op == "map" for rank in engine.ranks.values()):
        return []  # what it serves is being mapped anew, for `MAP_SECONDS` at most
    goal = _of_commit(goal_for(wanted, wanted.digest, at.versions))
    if not retry_state(engine, "commit", goal).may_start(at.now):
        # between two tries it serves as before, so its pod shows so
        engine.label_gone_since = None
        return []
    if not _unmarked(engine, at):
        return []
    # only Wait lets requests end first; with the others the time for that is never used
    drain = float(wanted.drain_timeout_seconds) if wanted.mode == "Wait" else 0.0
    deadline = at.now + drain + wanted.commit_timeout_seconds + at.bounds.commit_slack_seconds
    engine.happens(Happening.COMMIT_ASKED)
    leader.pending = PendingRequest(at.next_id(), "commit", goal, deadline)
    frame = frames.Commit(
        id=leader.pending.id,
        digest=wanted.digest,
        version=wanted.version,
        commit_token=wanted.token,
        mode=wanted.mode,
        drain_seconds=float(wanted.drain_timeout_seconds),
        deadline_seconds=float(wanted.commit_timeout_seconds),
    )
    return [Send(leader.conn, frame)]
