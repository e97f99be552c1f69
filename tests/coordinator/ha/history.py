"""What everybody was told, what was really written, and whether the two agree: pure, so that its
own mistakes can be tested.

The ledger is what the store wrote, in its order: the truth. The rest is what clients heard, by one
clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

_NEXT = {
    "begun": ("begun", "precommitted", "committed"),
    "precommitted": ("precommitted", "begun", "committed"),
}
"""What a token's phase may become; whatever is not here stays. Without a live worker that said so,
precommitted is begun again.
"""


@dataclass(frozen=True, slots=True)
class Written:
    """One state of the store. ``token`` and ``phase`` are the attempt's; ``current`` is the token
    of the last commit, 0: none.
    """

    token: int
    phase: str
    version: str
    current: int = 0
    current_version: str = ""
    precommits: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Told:
    """An answer, between when it was asked for and when it came."""

    began: float
    ended: float
    who: str
    decides: bool
    """Whether only a leader gives such an answer."""
    token: int
    phase: str = ""
    """Empty: it did not say."""
    version: str = ""
    current: int | None = None
    """None: it did not say."""
    current_version: str = ""


@dataclass(frozen=True, slots=True)
class Said:
    """A worker precommitted, or tried to."""

    began: float
    worker: str
    token: int


def faults(
    told: Sequence[Told], said: Sequence[Said], ledger: Sequence[Written], workers: Collection[str]
) -> Iterator[str]:
    """Everything that must not be."""
    yield from _ledger_faults(ledger, frozenset(workers))
    yield from _unwritten(told, ledger)
    yield from _premature(told, said, workers)
    yield from _lost(told)
    yield from _backwards(told)


def _ledger_faults(ledger: Sequence[Written], workers: frozenset[str]) -> Iterator[str]:
    """Every token has one outcome, what is current never goes back, and only what all prepared is
    committed.
    """
    for before, after in pairwise(ledger):
        if after.token < before.token:
            yield f"token went back from {before.token} to {after.token}"
        if after.current < before.current:
            yield f"current went back from {before.current} to {after.current}"
        elif after.current > before.current:
            committed = (after.token, after.phase) == (after.current, "committed")
            if (
                not committed and not before.token == after.current < after.token
            ):  # or committed, and the next begun at once
                yield f"{after.current} became current without its commit"
        if after.token == before.token:
            moved = (after.phase, after.version) != (before.phase, before.version)
            if moved and (
                after.phase not in _NEXT.get(before.phase, ()) or after.version != before.version
            ):
                yield (
                    f"token {after.token} was {before.phase} {before.version}, then {after.phase} "
                    f"{after.version}"
                )
        elif after.phase in ("precommitted", "committed"):
            yield f"token {after.token} is {after.phase} from the start"
        elif (after.token, after.phase) == (
            before.token + 1,
            "aborted",
        ) and before.phase not in _NEXT:
            yield f"token {after.token} aborted {before.token}, which was {before.phase}"
    for one in {one.token: one for one in ledger if one.phase == "committed"}.values():
        if missing := workers - one.precommits:
            yield f"token {one.token} was committed without {sorted(missing)}"


def _unwritten(told: Sequence[Told], ledger: Sequence[Written]) -> Iterator[str]:
    """Nobody hears what the store does not know."""
    states = {(one.token, one.phase) for one in ledger} | {
        (one.current, "committed") for one in ledger
    }
    currents = {(one.current, one.current_version) for one in ledger} | {(0, "")}
    versions = {(one.token, one.version) for one in ledger} | currents
    for before, after in pairwise(ledger):  # several decisions may have been one write
        if before.phase == "begun" and (after.token, after.phase) != (before.token, "begun"):
            states.add((before.token, "precommitted"))
        for token in range(before.token + 1, after.token):
            states |= {(token, "begun"), (token, "aborted")}
            versions |= {(token, before.version), (token, after.version)}
    for one in told:
        if one.phase not in ("", "idle") and (one.token, one.phase) not in states:
            yield f"{one.who} was told that {one.token} is {one.phase}, which was never written"
        if one.version and (one.token, one.version) not in versions:
            yield f"{one.who} was told that {one.token} is {one.version}, which was never written"
        if one.current is not None and (one.current, one.current_version) not in currents:
            yield (
                f"{one.who} was told that {one.current} {one.current_version} is current, which "
                "was never written"
            )


def _premature(
    told: Sequence[Told], said: Sequence[Said], workers: Collection[str]
) -> Iterator[str]:
    """That all have prepared, and a commit, are heard of only when every worker has spoken for
    it.
    """
    spoken: dict[tuple[str, int], float] = {}
    for one in said:
        key = one.worker, one.token
        spoken[key] = min(one.began, spoken.get(key, one.began))
    for (token, phase), heard in _first_heard(told).items():
        for worker in workers:
            if spoken.get((worker, token), float("inf")) > heard:
                yield f"{token} was called {phase} before {worker} had precommitted it"


def _first_heard(told: Sequence[Told]) -> dict[tuple[int, str], float]:
    heard: dict[tuple[int, str], float] = {}
    for one in told:
        for key in {(one.current or 0, "committed"), (one.token, one.phase)}:
            if key[0] and key[1] in ("precommitted", "committed"):
                heard[key] = min(one.ended, heard.get(key, one.ended))
    return heard


def _floor(one: Told) -> int:
    """The last commit that this answer vouches for."""
    return max(one.current or 0, one.token if one.phase == "committed" else 0)


def _lost(told: Sequence[Told]) -> Iterator[str]:
    """What a leader called committed holds in every leader's answer that is asked for later.

    A follower may know of a commit before its leader does, whose answer from the store is still on
    its way.
    """
    by_end = sorted((one for one in told if one.decides), key=lambda one: one.ended)
    ends = [one.ended for one in by_end]
    floors = list(accumulate((_floor(one) for one in by_end), max))
    for one in told:
        earlier = bisect_left(ends, one.began)
        floor = floors[earlier - 1] if earlier else 0
        vouched = one.token if one.current is None else one.current
        if one.decides and vouched < floor:
            yield (
                f"{one.who} was told {vouched} at {one.began:.3f}, after {floor} had been called "
                "committed"
            )


def _backwards(told: Sequence[Told]) -> Iterator[str]:
    """Whoever asks one coordinator again and again never sees what is current go back."""
    last: dict[str, int] = {}
    for one in sorted(told, key=lambda one: one.began):
        if one.current is not None:
            if one.current < last.get(one.who, 0):
                yield f"{one.who} saw current go back from {last[one.who]} to {one.current}"
            last[one.who] = one.current
