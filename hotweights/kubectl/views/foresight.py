"""What a rollout would do from here on, if nothing failed.

The operator's own `rollouts.decide` decides, on the objects that were read; between its decisions a
world without faults answers: nodes stage, engines prepare and commit, pods show it, and time passes
as `estimates` say (nothing, where nothing was measured). So the order of the pods, how many change
at once and where a canary waits are what the operator would do; the times are estimates. Promotions
come at once, and are counted. What keeps a pod back today keeps it back to the end.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from hotweights.kubectl.views.estimates import Estimate, Estimates
from hotweights.kubectl.views.snapshot import Clock, Snapshot
from hotweights_common import timestamps
from hotweights_crds.base import digest_label
from hotweights_crds.nodeweights import EngineStatus, PodAssignment, StagedVersion, StageItem
from hotweights_crds.weightrollout import VersionRef, WeightRolloutStatus
from hotweights_operator.decide import rollouts
from hotweights_operator.model.objects import DIGEST_LABEL, NodeState, Pod, Rollout, Version
from hotweights_operator.model.observed import Observed
from hotweights_operator.sim.cluster.api import Api

MOST_DECISIONS = 20_000
"""What is not over by then is not shown to its end."""
_OVER = ("Complete", "Stalled", "Aborted", "RolledBack")
_CONNECTED = ("Booting", "Serving", "Preparing", "Prepared", "Refused", "Failed")


@dataclass(frozen=True, slots=True)
class Staging:
    """What a node would fetch."""

    node: str
    nbytes: int  # at most; 0: it holds the version
    parents: tuple[str, ...]  # nodes that it pulls from; none: the source
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Change:
    """A pod that changes."""

    pod: str
    node: str
    at_seconds: float  # from now
    step: int  # of the canary, from 0; -1: without one, or after its last
    estimate: Estimate  # of the pause


@dataclass(frozen=True, slots=True)
class Wait:
    """A canary that waits for somebody, or for a time."""

    step: int
    kind: str  # Promotion, Time, Analysis
    at_seconds: float
    seconds: float  # 0: nobody knows


@dataclass(slots=True)
class Foresight:
    """All that would happen."""

    stagings: list[Staging] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    seconds: float = 0.0
    status: WeightRolloutStatus = field(default_factory=WeightRolloutStatus)  # at the end
    complete: bool = False


def foresee(
    snapshot: Snapshot, rollout: Rollout, version: Version, estimates: Estimates
) -> Foresight:
    """What setting ``spec.versionRef`` to this version would lead to. The version is usable, or made
    so by the caller.
    """
    world = _World(snapshot, rollout, version, estimates)
    world.run()
    return world.found


class _World:
    """A cluster in which nothing fails."""

    def __init__(
        self, snapshot: Snapshot, rollout: Rollout, version: Version, estimates: Estimates
    ) -> None:
        self.found = Foresight()
        self._clock = Clock(snapshot.now)
        self._start = snapshot.now
        self._version, self._estimates = version, estimates
        self._observed: Observed = snapshot.observed(self._clock)
        self._api = Api()
        self._due: list[tuple[datetime, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._committing: set[str] = set()
        for node in self._observed.nodes.values():
            self._api.put("node", node.name, node)
        for name in list(self._observed.states):
            self._api.put("state", name, self._observed.states[name])
            self._observed.put("state", name, self._api.get("state", name))
        # that their kubelets have seen the gates as they are: they have stood so for long
        for pod in list(self._observed.pods.values()):
            self._observed.put("pod", pod.uid, replace(pod, gate_since=None))
        self._observed.put("version", version.uid, version)
        spec = rollout.spec.model_copy(
            update={"version_ref": VersionRef(name=version.name), "paused": False}
        )
        self._rollout = replace(
            rollout, spec=spec, generation=rollout.generation + 1, command="", terminating=False
        )
        self._put()

    def run(self) -> None:
        """Until it is over, or nothing would happen any more."""
        for _ in range(MOST_DECISIONS):
            has_changed, again_seconds = self._decide()
            if has_changed:
                continue
            status = self._rollout.status
            if status.phase in _OVER or not self._goes_on(status, again_seconds):
                break
        self.found.status = self._rollout.status
        self.found.complete = self._rollout.status.phase == "Complete"
        self.found.seconds = self._seconds()

    # -- one moment -----------------------------------------------------------------------------

    def _decide(self) -> tuple[bool, float | None]:
        """One pass of the operator; whether it changed anything, and when the next one is due."""
        decision = rollouts.decide(self._rollout, self._observed, self._clock.now)
        before = self._rollout.status
        if decision.status is not None and decision.status != before:
            self._rollout = replace(self._rollout, status=decision.status)
            self._put()
        for action in decision.actions:
            name = self._api.perform(action)
            self._observed.put("state", name, self._api.get("state", name))
            self._obey(name)
        has_changed = bool(decision.actions) or self._rollout.status != before
        return has_changed, decision.again_in_seconds

    def _goes_on(self, status: WeightRolloutStatus, again_seconds: float | None) -> bool:
        """Let time pass until something may happen; False: nothing will."""
        canary = status.canary
        if not self._due and canary.waits_for in ("Promotion", "Analysis"):
            self._wait(canary.step, canary.waits_for, 0.0)
            # what an analysis finds nobody knows: here it finds nothing wrong
            text = f"promote {status.revision} {next(self._numbers)}"
            self._rollout = replace(self._rollout, command=text)
            self._put()
            return True
        moments = [self._due[0][0]] if self._due else []
        if again_seconds is not None:
            moments.append(self._clock.now + timedelta(seconds=max(again_seconds, 0.001)))
        if not moments:
            return False
        if not self._due and canary.waits_for == "Time":
            self._wait(canary.step, "Time", (min(moments) - self._clock.now).total_seconds())
        self._clock.now = min(moments)
        while self._due and self._due[0][0] <= self._clock.now:
            heapq.heappop(self._due)[2]()
        return True

    def _wait(self, step: int, kind: str, seconds: float) -> None:
        self.found.waits.append(Wait(step, kind, self._seconds(), seconds))

    def _in(self, seconds: float, happens: Callable[[], None]) -> None:
        moment = self._clock.now + timedelta(seconds=seconds)
        heapq.heappush(self._due, (moment, next(self._numbers), happens))

    def _seconds(self) -> float:
        return (self._clock.now - self._start).total_seconds()

    def _put(self) -> None:
        self._observed.put("rollout", self._rollout.uid, self._rollout)

    # -- what nodes do --------------------------------------------------------------------------

    def _obey(self, name: str) -> None:
        """A node's agent does what its object says."""
        if not self._observed.follows(name):
            return
        state: NodeState = self._api.get("state", name)
        wanted = {item.digest: item for entry in state.spec.rollouts for item in entry.stage}
        held = [v for v in state.status.staged if v.digest in wanted]
        for digest, item in wanted.items():
            if state.staged(digest) is None:
                held.append(self._begin(name, item))
        self._say(state, staged=held)
        for uid in {pod.uid for entry in state.spec.rollouts for pod in entry.pods}:
            self._steer(name, uid)

    def _begin(self, name: str, item: StageItem) -> StagedVersion:
        nbytes = self._version.status.nbytes if item.digest == self._version.status.digest else 0
        estimate = self._estimates.staging(name, nbytes)
        if item.digest == self._version.status.digest:
            parents = tuple(peer.node for peer in item.parents)
            self.found.stagings.append(Staging(name, nbytes, parents, estimate))
        self._in(estimate.seconds, lambda: self._has_staged(name, item.digest))
        return StagedVersion(
            digest=item.digest, version=item.version, phase="Fetching", bytes_total=nbytes
        )

    def _has_staged(self, name: str, digest: str) -> None:
        state: NodeState = self._api.get("state", name)
        done = [
            v.model_copy(update={"phase": "Staged", "bytes_done": v.bytes_total})
            if v.digest == digest
            else v
            for v in state.status.staged
        ]
        self._say(state, staged=done)
        self._obey(name)

    def _steer(self, name: str, uid: str) -> None:
        """An engine prepares, or begins to commit."""
        state: NodeState = self._api.get("state", name)
        engine, order = state.engine(uid), state.assigned(uid)
        pod = self._observed.pods.get(uid)
        if engine is None or order is None or pod is None or engine.phase not in _CONNECTED:
            return
        if order.digest and order.digest != engine.digest and state.holds(order.digest):
            self._commit(name, pod, engine, order)
        elif order.prepare and engine.prepared != order.prepare and state.holds(order.prepare):
            update = {"phase": "Prepared", "prepared": order.prepare, "failed": None}
            self._say_engine(name, engine.model_copy(update=update))

    def _commit(self, name: str, pod: Pod, engine: EngineStatus, order: PodAssignment) -> None:
        if pod.uid in self._committing:
            return
        self._committing.add(pod.uid)
        estimate = self._estimates.pause(pod.uid)
        if order.digest == self._version.status.digest:
            canary = self._rollout.status.canary
            step = canary.step if canary.step < canary.steps else -1
            self.found.changes.append(Change(pod.name, name, self._seconds(), step, estimate))
        self._in(estimate.seconds, lambda: self._has_committed(name, pod.uid, order))

    def _has_committed(self, name: str, uid: str, order: PodAssignment) -> None:
        self._committing.discard(uid)
        state: NodeState = self._api.get("state", name)
        engine, pod = state.engine(uid), self._observed.pods[uid]
        if engine is None:
            return
        update = {
            "phase": "Serving",
            "digest": order.digest,
            "version": order.version,
            "prepared": "",
            "failed": None,
            # later than any start of its container, which is in whole seconds
            "confirmed_at": timestamps.show_micros(self._clock.now + timedelta(seconds=1)),
        }
        self._say_engine(name, engine.model_copy(update=update))
        labels = {**pod.labels, DIGEST_LABEL: digest_label(order.digest)}
        shown = replace(pod, labels=labels, gate=True, ready=True, was_ready=True)
        self._observed.put("pod", uid, shown)
        self._steer(name, uid)

    def _say_engine(self, name: str, engine: EngineStatus) -> None:
        state: NodeState = self._api.get("state", name)
        engines = [engine if e.pod_uid == engine.pod_uid else e for e in state.status.engines]
        self._say(state, engines=engines)

    def _say(self, state: NodeState, **update: object) -> None:
        """What a node's agent reports."""
        said = {"observed_generation": state.generation, **update}
        self._api.set_status(state.name, state.status.model_copy(update=said))
        self._observed.put("state", state.name, self._api.get("state", state.name))
