"""Judges what people and policies asked for beside the spec: canary steps, commands, ways back.

By the truth, as `judge` does: who is told what stands in the API server, and what was answered in the
statuses that were written. What a step allows is counted anew and not by the code that is checked.
"""

from __future__ import annotations

from hotweights_crds.nodeweights import PodAssignment
from hotweights_operator.model.objects import NodeState, Pod, Rollout
from hotweights_operator.sim.cluster.world import JudgeContext
from hotweights_operator.sim.invariants import allowed_of


class IntentJudge:
    """Sees each order to a pod and each status of a rollout."""

    def __init__(self, bench: JudgeContext) -> None:
        self._bench = bench
        self._world = bench.world

    # -- canary ---------------------------------------------------------------------------------

    def assigned(self, rollout: Rollout, old: PodAssignment | None, new: PodAssignment) -> None:
        """Nobody is newly told the target beyond what the step allows."""
        known: Rollout | None = self._world.operator.cache.get(
            "rollout", f"{rollout.namespace}/{rollout.name}"
        )
        # what was decided on: an edit that the operator has not seen limits nothing yet
        if known is None or known.uid != rollout.uid or self._world.zombie:
            return
        target = known.status.target.digest
        if new.digest != target or (old is not None and old.digest == target):
            return
        if not target or target in self._bench.serves(new.uid):
            return
        pods = {pod.uid: pod for pod in (*self._bench.own(rollout), *self._bench.seen(rollout))}
        # some may have come or gone since, which makes a share of them another
        counts = (len(self._bench.own(rollout)), len(self._bench.seen(rollout)))
        limits = [allowed_of(known, max(*counts, known.status.pods.desired))]
        if limits[0] is None:
            return
        holding = sorted(uid for uid, pod in pods.items() if self._is_told(pod, target))
        self._bench.count("canary is told to change")
        if len(holding) > limits[0]:
            self._bench.fails(
                "a canary's step is kept",
                f"{holding} are told {target}, {limits[0]} of {counts} allowed at step "
                f"{known.status.canary.step}",
            )

    def _is_told(self, pod: Pod, digest: str) -> bool:
        state: NodeState | None = self._world.api.get("state", pod.node)
        order = state.assigned(pod.uid) if state is not None else None
        return order is not None and order.digest == digest

    # -- commands and ways back -----------------------------------------------------------------

    def told(self, before: Rollout, after: Rollout) -> None:
        """A status has been written."""
        self._commands(before, after)
        old, new = before.status, after.status
        if new.rolled_back.by and new.rolled_back != old.rolled_back:
            self._bench.count(f"led back by {new.rolled_back.by}")
        if new.canary.step > old.canary.step and new.revision == old.revision:
            self._bench.count("canary step ends")
        if new.canary.waits_for and new.canary.waits_for != old.canary.waits_for:
            self._bench.count(f"canary waits for {new.canary.waits_for}")
        is_spec = not new.rolled_back.by and after.spec.version_ref.name == new.target.name
        if new.phase == "Complete" and after.generation == new.observed_generation and not is_spec:
            self._bench.fails("Complete is what the spec names", new.target.name)

    def _commands(self, before: Rollout, after: Rollout) -> None:
        """Each text is answered once, a late one is refused, and what is refused changes nothing."""
        old, new = before.status, after.status
        was, answer = old.last_command, new.last_command
        if answer == was:
            return
        verb = answer.verb or "none"
        self._bench.count(f"command {answer.outcome}: {verb}")
        if answer.text == was.text:
            self._bench.fails("a command is acted on once", answer.text)
        number = answer.text.split()[1] if len(answer.text.split()) > 1 else ""
        if answer.outcome == "Done" and number != str(old.revision):
            self._bench.fails("a late command is refused", f"{answer.text} at {old.revision}")
        if answer.outcome == "Refused" and new.revision == old.revision:
            same = (old.paused_by, old.aborted_revision, old.canary.step)
            now = (new.paused_by, new.aborted_revision, new.canary.step)
            # what pods or the clock did in the same pass is no command's doing
            if same[0] != now[0] or (same[1] != now[1] and new.most_failed == 0):
                self._bench.fails(
                    "what is refused changes nothing", f"{answer.text}: {same}, {now}"
                )
