"""What `foresight` found, in words: every number that is an estimate says what it rests on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hotweights.kubectl.views import table
from hotweights.kubectl.views.estimates import Estimate
from hotweights.kubectl.views.foresight import Change, Foresight, Staging
from hotweights.kubectl.views.picture import step_text
from hotweights.kubectl.views.snapshot import Snapshot
from hotweights_common import sizes
from hotweights_operator.decide.strategy import canary, disruption_budget
from hotweights_operator.model.objects import Rollout, Version

_BASES = {"Own": "as its last", "Fleet": "as others' last", "None": "never measured here"}


@dataclass(frozen=True, slots=True)
class Plan:
    """What one release would do."""

    snapshot: Snapshot
    rollout: Rollout
    version: Version  # as it is: perhaps not resolved
    found: Foresight

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        found = self.found
        return {
            "namespace": self.rollout.namespace,
            "name": self.rollout.name,
            "from": self.rollout.status.target.version,
            "to": self.version.spec.version,
            "resolved": self.version.usable,
            "maxUnavailable": self._limit(),
            "complete": found.complete,
            "estimatedSeconds": found.seconds,
            "stagings": [_flat(asdict(staging)) for staging in found.stagings],
            "changes": [_flat(asdict(change)) for change in found.changes],
            "waits": [
                {
                    "step": wait.step,
                    "kind": wait.kind,
                    "atSeconds": wait.at_seconds,
                    "seconds": wait.seconds,
                }
                for wait in found.waits
            ],
            "keptBack": [failure.to_dict() for failure in found.status.failures],
            "notes": list(self._notes()),
        }

    def text(self) -> str:
        """For people."""
        parts = [
            self._head(),
            self._section("STAGE", self._staging_table()),
            self._section("CHANGE, in this order", self._change_table()),
            self._section("KEPT BACK, by what is so now", self._kept_back()),
            self._section("IN ALL", f"{self._sum()}\n"),
            self._section("NOTES", "".join(f"- {note}\n" for note in self._notes())),
        ]
        return "\n".join(part for part in parts if part)

    # -- sections -------------------------------------------------------------------------------

    def _section(self, title: str, body: str) -> str:
        return f"{title}\n{body}" if body else ""

    def _head(self) -> str:
        was = self.rollout.status.target.version or "what the engines booted"
        desired = self.found.status.pods.desired
        steps = canary.steps_of(self.rollout.spec)
        way = f"; canary of {len(steps)} steps" if steps else ""
        if self.found.status.goes_back and steps:
            way = "; a way back, which takes no canary steps"
        return (
            f"{self.rollout.namespace}/{self.rollout.name}: {was} → {self.version.spec.version}, "
            f"{self.rollout.spec.strategy.type}: at most {self._limit()} of {desired} pods "
            f"unavailable{way}\n"
        )

    def _limit(self) -> int:
        return disruption_budget.limit(self.rollout.spec.strategy, self.found.status.pods.desired)

    def _staging_table(self) -> str:
        if not self.found.stagings:
            return "nothing: every node holds the version\n"
        known = self.version.usable
        rows = [
            [s.node, _most(s, known=known), _from(s), _about(s.estimate) if known else "not known"]
            for s in self.found.stagings
        ]
        return table.drawn(["NODE", "BYTES", "FROM", "TAKES"], rows)

    def _change_table(self) -> str:
        if not self.found.changes:
            return "no pod: none that follows serves anything else\n"
        rows: list[list[str]] = []
        waits = list(self.found.waits)
        for number, change in enumerate(self.found.changes, 1):
            while (
                waits
                and waits[0].at_seconds <= change.at_seconds
                and _is_before(waits[0].step, change)
            ):
                rows.append(self._wait_row(waits.pop(0).step))
            rows.append(
                [
                    str(number),
                    change.pod,
                    change.node,
                    f"+{table.moment(change.at_seconds)}",
                    _about(change.estimate),
                    self._step(change.step),
                ]
            )
        rows += [self._wait_row(wait.step) for wait in waits]
        return table.drawn(["", "POD", "NODE", "AT", "PAUSE", "STEP"], rows)

    def _wait_row(self, step: int) -> list[str]:
        return ["", "-", "", "", "", self._step(step)]

    def _step(self, step: int) -> str:
        steps = canary.steps_of(self.rollout.spec)
        if not steps:
            return ""
        return f"{step + 1}: {step_text(steps[step])}" if 0 <= step < len(steps) else "the rest"

    def _kept_back(self) -> str:
        rows = [
            [failure.pod, failure.node or "-", f"{failure.reason}: {failure.message}"]
            for failure in self.found.status.failures
        ]
        return table.drawn(["POD", "NODE", "WHY"], rows) if rows else ""

    def _sum(self) -> str:
        promotions = sum(1 for wait in self.found.waits if wait.kind == "Promotion")
        analyses = sum(1 for wait in self.found.waits if wait.kind == "Analysis")
        parts = [f"about {table.moment(self.found.seconds)}", "as long as engines take to prepare"]
        if promotions:
            several = "a promotion" if promotions == 1 else f"{promotions} promotions"
            parts.append(f"as long as somebody takes for {several}")
        if analyses:
            parts.append("as long as its analyses take")
        end = "" if self.found.complete else f"; it would not complete: {self.found.status.message}"
        return " + ".join(parts) + end

    def _notes(self) -> Iterator[str]:
        if not self.version.usable:
            yield (
                f"WeightVersion {self.version.name} is not resolved, so neither its bytes nor whether "
                "a node has them are known: see `kubectl hotweights doctor`"
            )
        if self.rollout.spec.paused:
            yield "spec.paused is true: nothing of this happens before it is false"
        if words := self.snapshot.unreadable():
            yield (
                f"you may not list {', '.join(words)}: nodes are taken for Ready, their agents for "
                "present, and what nobody can see for absent"
            )
        if any(staging.nbytes for staging in self.found.stagings):
            yield (
                "bytes are at most: chunks that a node has of another version are not fetched again, "
                "and no status says how many those are"
            )
        if any(change.estimate.basis == "None" for change in self.found.changes):
            seconds = self.rollout.spec.activation.commit_timeout_seconds
            yield (
                f"a pause that was never measured counts as 0 s in the sum; its bound is {seconds} s "
                "(activation.commitTimeoutSeconds)"
            )
        if any(s.nbytes and s.estimate.basis == "None" for s in self.found.stagings):
            yield "nothing was fetched here before, so staging counts as 0 s in the sum"
        yield from self._memory_notes()
        yield "played without failures; a version that engines refuse ends it as failurePolicy says"

    def _memory_notes(self) -> Iterator[str]:
        free = {state.name: state.status.capacity for state in self.snapshot.states or ()}
        for staging in self.found.stagings:
            capacity = free.get(staging.node)
            if (
                capacity is not None
                and capacity.memory_bytes
                and staging.nbytes > capacity.free_bytes
            ):
                yield (
                    f"{staging.node}'s agent has {sizes.binary(capacity.free_bytes)} free and the "
                    f"version takes up to {sizes.binary(staging.nbytes)}: it may be refused as "
                    "InsufficientMemory"
                )


def _is_before(step: int, change: Change) -> bool:
    """Whether a step comes before the one in which a pod changes."""
    return change.step == -1 or step < change.step


def _most(staging: Staging, *, known: bool) -> str:
    return f"at most {sizes.binary(staging.nbytes)}" if known else "not known"


def _from(staging: Staging) -> str:
    return ", ".join(staging.parents) or "the source"


def _about(estimate: Estimate) -> str:
    if estimate.basis == "None":
        return _BASES["None"]
    return f"about {table.short_span(estimate.seconds)}, {_BASES[estimate.basis]}"


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    """In camelCase, with the estimate's parts beside the rest."""
    estimate = found.pop("estimate")
    names = {"at_seconds": "atSeconds", "nbytes": "mostBytes"}
    return {
        **{names.get(key, key): value for key, value in found.items()},
        "estimatedSeconds": estimate["seconds"],
        "basis": estimate["basis"],
    }
