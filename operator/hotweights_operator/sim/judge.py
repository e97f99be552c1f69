"""Judges every write that reaches the API server, and the world after every step, by the truth.

`invariants` asks whether a decision was right for what the operator saw. This asks whether what
came of it was right: it knows which engine really serves, and what any status ever said. What the
users of a Service get is in `availability`, what time has to do with it in `deadlines`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from hotweights_crds.conditions import find, is_true
from hotweights_crds.nodeweights import UNASSIGNED, PodAssignment, RolloutAssignment
from hotweights_crds.weightrollout import FailurePolicy, HistoryEntry, WeightRolloutStatus
from hotweights_operator.model.actions import AskResolve, Assign
from hotweights_operator.model.objects import NodeState, Pod, Rollout
from hotweights_operator.sim.availability import SEEN_STEPS, AvailabilityJudge
from hotweights_operator.sim.cluster.world import JudgeContext, World
from hotweights_operator.sim.deadlines import DeadlineJudge
from hotweights_operator.sim.invariants import limit_of


@dataclass(slots=True)
class GivenUp:
    """What a status said of a revision."""

    revision: int
    digest: str
    kind: str
    policy: FailurePolicy


@dataclass(slots=True)
class RolloutRecord:
    """What one rollout's statuses have said."""

    completed: set[str] = field(default_factory=set)
    last_complete: str = ""
    given_up: GivenUp | None = None
    most_prepared: int = 0
    seen: set[str] = field(default_factory=set)  # what was counted in this revision


class Judge:
    """The judge of one story: `Api` tells it of every write, and it sees the world after every
    step.
    """

    def __init__(self, world: World, ignored: Collection[str] = ()) -> None:
        """``ignored`` names invariants whose violation does not end the story."""
        self.world = world
        self.bench = JudgeContext(world, ignored)
        self.service = AvailabilityJudge(self.bench)
        self.patience = DeadlineJudge(self.bench)
        self._ledgers: dict[str, RolloutRecord] = {}  # by rollout UID
        self._prepared: dict[str, set[str]] = {}  # pod UID → what it ever prepared
        # node → for how many steps the operator has taken its agent to be there
        self._followed: dict[str, int] = {}

    def step(self) -> None:
        """After every step. Raises what was found in it."""
        self.bench.check()
        self._note_prepared()
        self._note_followed()
        self.service.step()
        for rollout in self.bench.rollouts():
            self._note_done(rollout, rollout.status.target.digest)
            self.patience.step(
                rollout,
                is_complete=rollout.status.target.digest == self._ledger(rollout).last_complete,
            )

    def fails(self, name: str, detail: str) -> None:
        """Raises `Violated`, unless it is ignored."""
        self.bench.fails(name, detail)

    def _ledger(self, rollout: Rollout) -> RolloutRecord:
        return self._ledgers.setdefault(rollout.uid, RolloutRecord())

    # -- writes to nodes ------------------------------------------------------------------------

    def refused(self, name: str, why: str) -> None:
        """Nobody writes what the schema does not allow."""
        self.fails("bounded", f"{name}: {why}")

    def resolving(self, action: AskResolve) -> None:
        """A source is read for its own namespace."""
        item = action.item
        if item is not None and not item.uri.startswith(f"file:///{item.namespace}/"):
            self.fails("tenants never mix", f"{item.namespace}/{item.name} is read from {item.uri}")

    def assigned(self, before: NodeState, action: Assign) -> None:
        """An operator's entry has been written; the API server has it already."""
        entry, after = action.entry, self.world.api.get("state", action.node)
        if entry is None:  # it was taken away: nobody is told anything by that
            return
        self._tenants_of_entry(entry)
        rollout = self.bench.rollout(action.uid) if action.uid != UNASSIGNED else None
        for pod in entry.pods:
            old, new = before.assigned(pod.uid), after.assigned(pod.uid)
            if rollout is not None:
                self._given_up(rollout, old, pod)
                if self.patience.is_beyond(rollout) and pod.digest != (old.digest if old else ""):
                    self._keeps_the_policy(rollout, pod)
                self.service.told(rollout, old, pod)
                if pod.prepare and (old is None or old.prepare != pod.prepare):
                    self._asked(rollout, pod)
                elif old is not None and old.prepare and not pod.prepare and rollout.spec.paused:
                    self.bench.count("withdraws what is not prepared")
            if new is not None:
                self.service.counts_now(pod.uid, new.digest)

    def _tenants_of_entry(self, entry: RolloutAssignment) -> None:
        tenants = self.world.tenants
        for item in entry.stage:
            owner = tenants.get(item.digest, item.namespace)
            foreign = entry.uid != UNASSIGNED and item.namespace != entry.namespace
            if foreign or owner != item.namespace or not item.uri.startswith(f"file:///{owner}/"):
                self.fails(
                    "tenants never mix",
                    f"{entry.namespace}/{entry.name} stages {item.digest} from {item.uri}",
                )
        for pod in entry.pods:
            known: Pod | None = self.world.api.get("pod", pod.uid)
            namespace = known.namespace if known is not None else pod.namespace
            wrong = {
                digest
                for digest in (pod.digest, pod.prepare)
                if digest and tenants.get(digest) != namespace
            }
            if (
                wrong
                or pod.namespace != namespace
                or (entry.uid != UNASSIGNED and entry.namespace != namespace)
            ):
                self.fails(
                    "tenants never mix",
                    f"{namespace}/{pod.name} in {entry.namespace}/{entry.name}: {wrong}",
                )

    def _given_up(self, rollout: Rollout, old: PodAssignment | None, new: PodAssignment) -> None:
        """Once a revision was given up, no pod is newly told or asked to prepare its version in
        that revision.
        """
        found = self._still_given_up(rollout)
        if found is None or self.world.zombie:
            return
        if found.digest in (rollout.status.stable.digest, self._ledger(rollout).last_complete):
            return
        told = new.digest == found.digest and (old is None or old.digest != found.digest)
        asked = new.prepare == found.digest and (old is None or old.prepare != found.digest)
        if (told or asked) and found.digest not in self.bench.serves(new.uid):
            what = "told to serve" if told else "asked to prepare"
            self.fails(
                "given up stays given up", f"{new.uid} was {what} {found.digest} after {found.kind}"
            )

    def _still_given_up(self, rollout: Rollout) -> GivenUp | None:
        """Until there is another revision (a retry is one), or the policy allows more."""
        ledger = self._ledger(rollout)
        found = ledger.given_up
        if found is None or found.revision != rollout.status.revision:
            return None
        if found.kind == "TooManyFailures" and found.policy != rollout.spec.failure_policy:
            self.bench.count("policy lets it go on")
            ledger.given_up = None
        return ledger.given_up

    def _keeps_the_policy(self, rollout: Rollout, new: PodAssignment) -> None:
        """Nobody is told the target once more engines have given it up than the policy allows."""
        target = rollout.status.target.digest
        if (
            new.digest == target
            and target not in self.bench.serves(new.uid)
            and not self.world.zombie
        ):
            self.fails("the failure policy is kept", f"{new.uid} was told to serve {new.digest}")

    # -- preparing ------------------------------------------------------------------------------

    def _note_prepared(self) -> None:
        for uid, engine in self.world.fleet.engines.items():
            if engine.prepared or engine.digest:
                self._prepared.setdefault(uid, set()).update(
                    {engine.prepared, engine.digest} - {""}
                )

    def _asked(self, rollout: Rollout, new: PodAssignment) -> None:
        """Pods prepare a version that is not the stable one in waves: as many at a time as may be
        unavailable, or have done it.
        """
        digest, ledger = new.prepare, self._ledger(rollout)
        known: Pod | None = self.world.api.get("pod", new.uid)
        if known is None or self.world.zombie or digest != rollout.status.target.digest:
            return
        self._note_prepared()
        if digest in self._prepared.get(new.uid, ()):
            return
        own, done = self.bench.own(rollout), self._note_done(rollout, digest)
        if done:
            self.bench.count("prepares in waves")
        if (
            digest in (rollout.status.stable.digest, ledger.last_complete)
            or rollout.status.goes_back
        ):
            return
        waiting = sorted(
            pod.uid
            for pod in own
            if pod.uid not in done and self._prepares(pod, known.node, digest)
        )
        # Some may have begun to go since it was decided, which makes a share of them less.
        counts = (len(own), len(self.bench.seen(rollout)), rollout.status.pods.desired)
        allowed = max(*(limit_of(rollout, count) for count in counts), ledger.most_prepared)
        if len(waiting) > allowed:
            self.fails(
                "prepares in waves", f"{waiting} prepare {digest} at once, {allowed} allowed"
            )

    def _note_followed(self) -> None:
        view = self.world.operator.cache.observed()
        for node in self.world.api.objects["node"]:
            self._followed[node] = self._followed.get(node, 0) + 1 if view.follows(node) else 0

    def _note_done(self, rollout: Rollout, digest: str) -> set[str]:
        """The pods that have prepared a version, with those that go by now as long as the operator
        takes them for living.
        """
        pods = [*self.bench.own(rollout), *self.bench.seen(rollout)]
        done = {pod.uid for pod in pods if digest in self._prepared.get(pod.uid, ())}
        ledger = self._ledger(rollout)
        ledger.most_prepared = max(ledger.most_prepared, len(done))
        return done

    def _prepares(self, pod: Pod, here: str, digest: str) -> bool:
        """Whether a pod that serves was asked and has neither done it nor given up; one that went
        away since is not waited for.
        """
        view = self.world.operator.cache.observed()
        state: NodeState | None = self.world.api.get("state", pod.node)
        order, said = (
            (state.assigned(pod.uid), state.engine(pod.uid)) if state is not None else (None, None)
        )
        engine = self.world.fleet.engines.get(pod.uid)
        is_back = view.follows(pod.node) and self._followed.get(pod.node, 0) >= SEEN_STEPS
        if view.follows(here) and not is_back:
            return False
        if (
            order is None
            or order.prepare != digest
            or engine is None
            or engine.boots
            or engine.digest == digest
        ):
            return False
        staged = state.staged(digest) if state is not None else None
        if staged is not None and staged.phase == "Failed":
            return False
        seen = view.states[pod.node].engine(pod.uid) if pod.node in view.states else None
        if seen is None or seen.phase == "Disconnected" or pod.restarts > order.restarts:
            # it ended meanwhile, and nobody knows when the operator hears of its return
            return False
        return said is None or said.failed is None or said.failed.digest != digest

    # -- statuses -------------------------------------------------------------------------------

    def told(self, before: Rollout, after: Rollout) -> None:
        """A rollout's status has been written."""
        if before.uid != after.uid:
            return
        status, ledger = after.status, self._ledger(after)
        if status.revision != before.status.revision:
            if status.target.digest in ledger.completed:
                self.bench.count("rolled back")
            ledger.seen, ledger.most_prepared = set(), 0
        self._tenants_of_status(after)
        self._versions(status, ledger)
        self._note_given_up(after, ledger)
        self.patience.told(before, after)
        self._count_paths(before, after, ledger)
        if is_true(status.conditions, "Ready"):
            self._complete(after)
            ledger.completed.add(status.target.digest)
            ledger.last_complete = status.target.digest

    def _tenants_of_status(self, rollout: Rollout) -> None:
        status, tenants = rollout.status, self.world.tenants
        for version in (status.target, status.stable, status.previous, *status.held):
            if version.digest and tenants.get(version.digest) != rollout.namespace:
                self.fails(
                    "tenants never mix",
                    f"{rollout.namespace}/{rollout.name} names {version.digest}",
                )
        for failure in status.failures:
            if failure.pod and not failure.pod.startswith(f"{rollout.namespace}-"):
                self.fails(
                    "tenants never mix",
                    f"{rollout.namespace}/{rollout.name} names the pod {failure.pod}",
                )

    def _versions(self, status: WeightRolloutStatus, ledger: RolloutRecord) -> None:
        """Stable is what was complete last, and previous names only what was complete at some
        time.
        """
        expected = (
            status.target.digest if is_true(status.conditions, "Ready") else ledger.last_complete
        )
        if status.stable.digest != expected:
            detail = (
                f"{status.stable.digest or 'nothing'} is called so, not {expected or 'nothing'}"
            )
            self.fails("stable is what was complete", detail)
        if status.previous.digest and status.previous.digest not in ledger.completed:
            self.fails("previous names only what was complete", status.previous.digest)
        if status.goes_back and status.target.digest not in ledger.completed:
            self.fails("it goes back only to what was complete", status.target.digest)

    def _note_given_up(self, rollout: Rollout, ledger: RolloutRecord) -> None:
        status, kind = rollout.status, ""
        if status.revision and status.aborted_revision == status.revision:
            kind = "Aborted"
        elif reason_of(status, "Paused") == "TooManyFailures":
            kind = "TooManyFailures"
        known = ledger.given_up
        if kind and status.target.digest and (known is None or known.revision != status.revision):
            self.bench.count(f"given up: {kind}")
            policy = rollout.spec.failure_policy
            ledger.given_up = GivenUp(status.revision, status.target.digest, kind, policy)

    def _complete(self, rollout: Rollout) -> None:
        """Complete only when every pod is Ready, by the status's own counts and by the pods that it
        could see.
        """
        pods = rollout.status.pods
        if not 0 < pods.desired == pods.updated == pods.ready:
            self.fails(
                "Complete only when Ready",
                f"{pods.updated} updated, {pods.ready} ready of {pods.desired}",
            )
        for pod in self.bench.own(rollout) if not self.world.zombie else ():
            seen: Pod | None = self.world.operator.cache.get("pod", pod.uid)
            if (
                seen is not None
                and seen.live
                and (not seen.ready or self.service.is_under_way(pod))
            ):
                self.fails("Complete only when Ready", f"{pod.uid} is not")

    # -- counting -------------------------------------------------------------------------------

    def _count_paths(self, before: Rollout, after: Rollout, ledger: RolloutRecord) -> None:
        old, new = before.status, after.status
        if new.phase != old.phase:
            self.bench.count(f"phase {new.phase}")
        if new.prepared_revision > old.prepared_revision:
            self.bench.count("gate passed")
        if new.retried != old.retried:
            self.bench.count("retried")
        nodes = {failure.node for failure in new.failures} & self.world.api.refusing
        reasons = {failure.reason for failure in new.failures}
        failed_before = any(entry.version == new.target.version for entry in _bad(new))
        once = {
            "conflict of two rollouts": reason_of(new, "Stalled") == "TargetConflict",
            "deadline exceeded": reason_of(new, "Stalled") == "ProgressDeadlineExceeded",
            "goes on although pods failed": new.pods.failed > 0 and new.phase == "Activating",
            "leaves a crash loop out": "CrashLooping" in reasons,
            "works beside a node that refuses writes": bool(nodes) and new.pods.updated > 0,
            "version that failed before is tried again": new.revision != old.revision
            and failed_before,
        }
        for name, happened in once.items():
            if happened and name not in ledger.seen:
                ledger.seen.add(name)
                self.bench.count(name)


def reason_of(status: WeightRolloutStatus, kind: str) -> str:
    """The reason of a condition that is True."""
    found = find(status.conditions, kind)
    return found.reason if found is not None and found.status == "True" else ""


def _bad(status: WeightRolloutStatus) -> list[HistoryEntry]:
    return [entry for entry in status.history if entry.outcome != "Complete"]
