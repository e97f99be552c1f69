"""What a command does: to the status, and to nothing else.

A command is answered once, in ``status.lastCommand``, which is written together with what it changes;
so it is done whole or not at all, and a text that stands there is not looked at again. It speaks of
one revision. What pauses, promotes or gives up that one ends with it.

`restart-failed` is `retry`: an engine that gave a version up is asked again in another revision only
(its agent remembers what failed by digest and revision), so there is no lesser way to ask.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from hotweights_common import timestamps
from hotweights_crds.weightrollout import CommandStatus, VersionStatus, WeightRolloutStatus
from hotweights_operator.decide import revision, rollback
from hotweights_operator.decide.strategy import canary
from hotweights_operator.model.commands import Command, NotACommand, parse
from hotweights_operator.model.objects import Rollout, Version
from hotweights_operator.model.observed import Observed


@dataclass(frozen=True, slots=True)
class Answered:
    """The status with the answer in it."""

    status: WeightRolloutStatus
    again: bool = False  # the spec's version is to be tried once more


class Refused(Exception):
    """A command that cannot be done; it says why, and what to do."""


@dataclass(frozen=True, slots=True)
class _Done:
    status: WeightRolloutStatus
    message: str
    again: bool = False


def answered(rollout: Rollout, observed: Observed, now: datetime) -> Answered:
    """What the rollout's command changes; nothing if there is none, or it was answered before.
    `rollouts` calls it first of all in a pass.
    """
    status, text = rollout.status, rollout.command
    if not text or text == status.last_command.text or rollout.terminating:
        return Answered(status)
    answer = CommandStatus(text=text, outcome="Refused", at=timestamps.show(now))
    again = False
    try:
        command = parse(text)
        answer = answer.model_copy(update={"verb": command.verb, "revision": command.revision})
        done = _do(command, rollout, observed, now)
        status, again = done.status, done.again
        answer = answer.model_copy(update={"outcome": "Done", "message": done.message[:512]})
    except (NotACommand, Refused) as error:
        answer = answer.model_copy(update={"message": str(error)[:512]})
    return Answered(status.model_copy(update={"last_command": answer}), again)


def _do(command: Command, rollout: Rollout, observed: Observed, now: datetime) -> _Done:
    status = rollout.status
    if command.revision != status.revision or not status.revision:
        raise Refused(
            f"revision {status.revision} is current, to {status.target.version or 'no version'}: "
            f"{command.verb} was for revision {command.revision}"
        )
    match command.verb:
        case "pause":
            return _pause(status)
        case "resume":
            return _resume(rollout, observed)
        case "promote":
            return _promote(rollout, now)
        case "promote-full":
            return _promote_full(rollout, now)
        case "abort":
            return _abort(status)
        case "retry" | "restart-failed":
            return _retry(rollout, observed)
        case "rollback":
            return _rollback(command, rollout, observed, now)


def _pause(status: WeightRolloutStatus) -> _Done:
    _not_over(status, "pause")
    if status.paused_by:
        raise Refused("it is paused by a command already: resume ends that")
    return _Done(
        status.model_copy(update={"paused_by": "Command"}),
        "paused: nothing further is activated until a resume, or another revision",
    )


def _resume(rollout: Rollout, observed: Observed) -> _Done:
    status = rollout.status
    if status.paused_by:
        more = "; spec.paused still holds it" if rollout.spec.paused else ""
        return _Done(status.model_copy(update={"paused_by": ""}), f"resumed{more}")
    if rollback.is_on(status):
        return _retry(rollout, observed)
    if rollout.spec.paused:
        raise Refused("spec.paused is true: set it to false, since no command changes the spec")
    raise Refused(
        "no command has paused it: promote ends a canary's pause, retry tries again what failed"
    )


def _promote(rollout: Rollout, now: datetime) -> _Done:
    spec, status = rollout.spec, rollout.status
    _not_over(status, "promote")
    step = canary.current(spec, status.canary)
    if step is None or not status.canary.steps:
        raise Refused("no canary step is under way: there is nothing to promote")
    if not canary.kind_of(step).promotable:
        raise Refused(
            f"{canary.tell(spec, status)}: promote ends a pause only, promote-full skips all steps"
        )
    after = canary.moved(spec, status, status.canary.step + 1, status.pods.desired, now)
    return _Done(after, f"promoted: {canary.tell(spec, after) or 'all pods may change'}")


def _promote_full(rollout: Rollout, now: datetime) -> _Done:
    spec, status = rollout.spec, rollout.status
    _not_over(status, "promote-full")
    steps = len(canary.steps_of(spec))
    if canary.current(spec, status.canary) is None or not status.canary.steps:
        raise Refused("no canary step is under way: there is nothing to promote")
    after = canary.moved(spec, status, steps, status.pods.desired, now)
    return _Done(after, "promoted: the remaining steps are skipped, all pods may change")


def _abort(status: WeightRolloutStatus) -> _Done:
    _not_over(status, "abort")
    return _Done(
        status.model_copy(update={"aborted_revision": status.revision}),
        "given up: every pod keeps what it serves; retry tries it again, rollback leads back",
    )


def _retry(rollout: Rollout, observed: Observed) -> _Done:
    status, name = rollout.status, rollout.spec.version_ref.name
    version = observed.version_index.named(rollout.namespace, name)
    if version is None or not version.usable:
        raise Refused(f"WeightVersion {name} is not resolved: see its condition Resolved")
    was_back = rollback.is_on(status)
    if revision.is_completed(status) and status.target.digest == version.status.digest:
        raise Refused(f"revision {status.revision} is complete: there is nothing to retry")
    return _Done(
        rollback.ended(status),
        f"{version.spec.version} is tried {'after the way back ' if was_back else ''}once more",
        again=True,
    )


def _rollback(command: Command, rollout: Rollout, observed: Observed, now: datetime) -> _Done:
    status, name = rollout.status, rollout.spec.version_ref.name
    # else what was never tried would count as left
    if not rollback.is_on(status) and status.target.name != name:
        raise Refused(
            f"spec.versionRef names {name}, which no revision has begun: rollback would be from "
            f"{status.target.name}; set spec.versionRef instead"
        )
    to = _named(command.argument, rollout, observed) if command.argument else status.previous
    if not to.digest:
        raise Refused("nothing was complete before: write rollback@VERSION to name where to")
    if to.digest == status.target.digest:
        raise Refused(f"revision {status.revision} leads to {to.version} already")
    wanted = observed.version_index.named(rollout.namespace, name)
    if wanted is not None and wanted.status.digest == to.digest:
        raise Refused(f"{to.version} is what spec.versionRef names: retry leads to it")
    after = rollback.begun(
        rollout, status, to, "Command", "Requested", f"asked for by {command.text!r}", now
    )
    return _Done(after, f"all pods are led back to {to.version}")


def _named(argument: str, rollout: Rollout, observed: Observed) -> VersionStatus:
    """A version by the name of its WeightVersion, or by what it is called: of those that the rollout
    knows first. Raises `Refused`.
    """
    status, index = rollout.status, observed.version_index
    known = [revision.stable(status), status.previous, *status.earlier, *status.held]
    for mine in known:
        if mine.digest and argument in (mine.name, mine.version):
            return mine
    named = index.named(rollout.namespace, argument)
    found: list[Version] = [named] if named is not None else []
    if not found:
        found = [
            v
            for v in index.by_uid.values()
            if v.namespace == rollout.namespace and v.spec.version == argument and not v.terminating
        ]
    if not found:
        raise Refused(
            f"no WeightVersion of namespace {rollout.namespace} is named {argument}, nor has it as "
            "its version"
        )
    if len(found) > 1:
        names = ", ".join(sorted(v.name for v in found))
        raise Refused(f"{argument} is the version of several: name one of {names[:200]}")
    if not found[0].usable:
        raise Refused(f"WeightVersion {found[0].name} is not resolved: see its condition Resolved")
    return revision.describe(found[0])


def _not_over(status: WeightRolloutStatus, verb: str) -> None:
    """Raises `Refused` for a revision in which nothing goes on that could be steered."""
    if revision.is_completed(status):
        raise Refused(f"revision {status.revision} is complete: there is nothing to {verb}")
    if status.aborted_revision == status.revision:
        raise Refused(f"revision {status.revision} is given up: retry tries it again")
