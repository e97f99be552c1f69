"""What time has to do with a rollout: its deadline passes when it gets no further, and failures
that were seen are acted upon.

Both are measured in steps of an operator that is awake, because it may work on a thing some steps
after it has seen it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from hotweights_crds.conditions import is_true
from hotweights_operator.model.objects import NodeState, Rollout
from hotweights_operator.sim.cluster.world import JudgeContext

DEADLINE_SLACK_SECONDS = 20.0
LATE_STEPS = 25
BEYOND_STEPS = 8


@dataclass(slots=True)
class _Progress:
    """How far one rollout's revision has come, as its statuses say."""

    key: tuple[object, ...] = ()
    high: tuple[int, ...] = ()
    at: datetime | None = None  # when it last came further
    late_steps: int = 0
    failed: int = 0  # pods whose engines have given it up
    # for how long the operator has seen more pods fail than the policy allows
    beyond_steps: int = 0


class DeadlineJudge:
    """What every rollout has reached so far, and for how long it has got no further."""

    def __init__(self, bench: JudgeContext) -> None:
        self._bench = bench
        self._world = bench.world
        self._courses: dict[str, _Progress] = {}  # by rollout UID

    def told(self, before: Rollout, after: Rollout) -> None:
        """Progress is what goes beyond the furthest of the revision; a few things begin the time
        anew.
        """
        old, new, course = before.status, after.status, self._course(after)
        begins = ("Ready", "Paused", "VersionResolved", "TargetsFound")
        key = (new.revision, after.generation, *(is_true(new.conditions, kind) for kind in begins))
        reached = (
            new.nodes.staged,
            new.nbytes.done,
            new.pods.prepared,
            new.pods.updated,
            new.pods.ready,
        )
        grown = any(a > b for a, b in zip(reached, course.high, strict=False))
        if key != course.key or grown or new.pods.desired > old.pods.desired:
            course.at, course.late_steps = self._world.now, 0
        if old.revision != new.revision:  # failures of another revision do not count in this one
            course.beyond_steps = 0
        if key != course.key:
            course.high, course.key = reached, key
        else:
            course.high = tuple(map(max, reached, course.high))

    def is_beyond(self, rollout: Rollout) -> bool:
        """Whether the operator has long seen more engines give the target up in this revision than
        the policy allows.
        """
        course = self._course(rollout)
        return (
            course.beyond_steps >= BEYOND_STEPS
            and course.failed > rollout.spec.failure_policy.max_failed
        )

    def step(self, rollout: Rollout, *, is_complete: bool) -> None:
        """Called after every step, for each rollout. ``is_complete``: its target was complete
        before. Raises `Violated`.
        """
        self._watch_deadline(rollout, self._course(rollout))
        self._watch_policy(rollout, self._course(rollout), is_complete=is_complete)

    def _course(self, rollout: Rollout) -> _Progress:
        return self._courses.setdefault(rollout.uid, _Progress())

    def _watch_deadline(self, rollout: Rollout, course: _Progress) -> None:
        """A rollout that does not get further says so in time, whatever goes to and fro meanwhile.
        A process counts from its own start at the earliest, since what another one wrote is by
        another clock.
        """
        conditions = rollout.status.conditions
        held = any(is_true(conditions, kind) for kind in ("Ready", "Paused", "Stalled"))
        if (
            held
            or course.at is None
            or not is_true(conditions, "VersionResolved")
            or not rollout.status.pods.desired
        ):
            course.late_steps = 0
            return
        seconds = rollout.spec.progress_deadline_seconds + DEADLINE_SLACK_SECONDS
        if self._world.now > max(course.at, self._world.operator.loop.started_at) + timedelta(
            seconds=seconds
        ):
            course.late_steps += 1
            if course.late_steps > LATE_STEPS:
                self._bench.fails(
                    "the deadline passes",
                    f"{rollout.name} has got no further since {course.at:%H:%M:%S}",
                )

    def _watch_policy(self, rollout: Rollout, course: _Progress, *, is_complete: bool) -> None:
        target, cache = rollout.status.target.digest, self._world.operator.cache
        if not target or is_complete:
            course.beyond_steps = 0
            return
        failed, ours = 0, (target, rollout.uid, rollout.status.revision)
        for pod in self._bench.own(rollout):
            state: NodeState | None = cache.get("state", pod.node)
            said = state.engine(pod.uid) if state is not None else None
            if said is not None and said.failed is not None and said.digest != target:
                failed += (said.failed.digest, said.failed.rollout, said.failed.revision) == ours
        course.failed = failed
        beyond = failed > rollout.spec.failure_policy.max_failed
        course.beyond_steps = course.beyond_steps + 1 if beyond else 0
