"""Judges what is measured of canaries: nobody passes by a step that measures unless it was
successful, was promoted, or is a step no more; what speaks against a version holds it.

By the truth: what the instruments gave, and who is told what.
"""

from __future__ import annotations

from hotweights_crds.analysis import AnalysisStatus, AnalysisStep
from hotweights_crds.nodeweights import PodAssignment
from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_operator.model.measurements import MeasurementId
from hotweights_operator.model.objects import Rollout
from hotweights_operator.sim.cluster.world import JudgeContext


class AnalysisJudge:
    """Sees each order to a pod and each status of a rollout."""

    def __init__(self, bench: JudgeContext) -> None:
        self._bench = bench
        self._world = bench.world

    def assigned(self, rollout: Rollout, old: PodAssignment | None, new: PodAssignment) -> None:
        """Nobody is newly told a version that its analysis speaks against."""
        known: Rollout | None = self._world.operator.cache.get(
            "rollout", f"{rollout.namespace}/{rollout.name}"
        )
        if known is None or known.uid != rollout.uid or self._world.zombie:
            return
        target, analysis = known.status.target.digest, known.status.analysis
        if new.digest != target or (old is not None and old.digest == target):
            return
        if target in self._bench.serves(new.uid) or known.status.goes_back:
            return
        is_against = analysis.phase in ("Failed", "Error") and _is_of_step(known.status)
        if is_against and _step_of(known) is not None:
            self._bench.fails(
                "a failed analysis holds",
                f"{new.uid} was told to serve {target}: {analysis.message}",
            )

    def told(self, before: Rollout, after: Rollout) -> None:
        """A status has been written."""
        old, new = before.status, after.status
        if new.analysis.phase != old.analysis.phase and new.analysis.phase:
            self._bench.count(f"analysis {new.analysis.phase}")
        if new.analysis.phase == "Successful" and new.analysis != old.analysis:
            self._was_measured(after, new.analysis)
        if new.revision != old.revision or new.canary.step <= old.canary.step:
            return
        if _step_of(before) is None or before.generation != old.observed_generation:
            return
        if new.last_command != old.last_command and new.last_command.verb.startswith("promote"):
            self._bench.count("analysis is promoted away")
        elif not (new.analysis.phase == "Successful" and _place(new.analysis) == _place_of(old)):
            self._bench.fails(
                "a step that measures ends with a success",
                f"step {old.canary.step} ended with {new.analysis.phase or 'nothing'}",
            )

    def _was_measured(self, rollout: Rollout, analysis: AnalysisStatus) -> None:
        """Every success that is counted was given."""
        for metric in analysis.metrics:
            given = 0
            for id_, what in self._world.fleet.instruments.gave.items():
                place = MeasurementId(rollout.uid, *_place(analysis), metric.name, id_.number)
                given += id_ == place and bool(what & {"a good value", "no value"})
            if metric.successful > given:
                self._bench.fails(
                    "a success was measured", f"{metric.name}: {metric.successful}, {given} given"
                )


def _step_of(rollout: Rollout) -> AnalysisStep | None:
    canary, step = rollout.spec.strategy.canary, rollout.status.canary.step
    steps = canary.steps if canary is not None else []
    return steps[step].analysis if step < len(steps) else None


def _place(analysis: AnalysisStatus) -> tuple[int, int, str]:
    return (analysis.revision, analysis.step, analysis.started_at)


def _place_of(status: WeightRolloutStatus) -> tuple[int, int, str]:
    return (status.revision, status.canary.step, status.canary.step_started_at)


def _is_of_step(status: WeightRolloutStatus) -> bool:
    return _place(status.analysis) == _place_of(status)
