"""WeightVersions: one agent reads the source, and what it finds becomes the version's identity for
good.

The request stands in one node's NodeWeights until there is an answer. When that node's agent goes
away it is given to another; when the source cannot be read, the agent goes on trying and what it
says is shown, so a repaired source needs no help from us. A folder may be on some nodes only, so
another node is asked as well when one does not find it.
"""

from __future__ import annotations

import hashlib
from datetime import datetime

from hotweights_common import sizes, timestamps
from hotweights_common.reasons import Reason
from hotweights_crds.conditions import Condition, upsert
from hotweights_crds.nodeweights import MAX_RESOLVE, ResolvedVersion, ResolveItem
from hotweights_crds.weightversion import WeightVersionStatus
from hotweights_operator.model.actions import AskResolve, Event, ObjectRef, VersionDecision
from hotweights_operator.model.objects import NodeState, Version
from hotweights_operator.model.observed import Observed

MAX_READERS = 8
"""Nodes that are asked for one source: a path with a mistake in it must not go round the cluster."""

# a quarter: no tenant's broken sources take all of what an agent may be asked to read
MAX_RESOLVE_OF_NAMESPACE = MAX_RESOLVE // 4


def decide(version: Version, observed: Observed, now: datetime) -> VersionDecision:
    """One step for one version, by `loop` for its key. A digest, once found, is never asked for
    again: it is the version's identity.
    """
    asked = observed.asked(version.uid)
    if version.status.digest:
        return VersionDecision(
            actions=_take_back(version, asked, observed),
            status=_status(version, now, "True", "Resolved", _found(version.status)),
        )
    readers = _readers(version, asked, observed)
    if not readers and any(observed.follows(name) for name in observed.states):
        return VersionDecision(
            status=_status(
                version, now, "False", Reason.WAITS_FOR_AGENT, _why_nobody(version, observed)
            )
        )
    if not readers:
        message = "no node has a ready agent that could read the source: see the agents' DaemonSet"
        return VersionDecision(status=_status(version, now, "False", Reason.NO_AGENT, message))
    reader = readers[-1]  # those before it did not find the source
    answer = _answer(observed.states[reader], version.uid) if reader in asked else None
    if answer is None:
        text = f"the agent of node {reader} reads the source"
        if len(readers) > 1:
            text += f"; it is not on node {readers[-2]}"
        status = _status(version, now, "False", "Resolving", text)
        return VersionDecision(actions=_ask(version, readers, asked, observed), status=status)
    if answer.digest:
        return _resolved(version, answer, now)
    return _failed(version, answer, reader, now)


def _readers(version: Version, asked: list[str], observed: Observed) -> list[str]:
    """Nodes that are to read the source: those that were asked and did not find it, and last one
    more. None: nobody can be asked.
    """
    alive = [name for name in asked if observed.follows(name)]
    lacking = [name for name in alive if _lacks(_answer(observed.states[name], version.uid))]
    # whoever reads it already goes on; of several (a lost write) the first by name, every time
    reading = next((name for name in alive if name not in lacking), None)
    if reading is None and len(lacking) < MAX_READERS:
        reading = _another(version, lacking, observed)
    return lacking if reading is None else [*lacking, reading]


def _lacks(answer: ResolvedVersion | None) -> bool:
    return answer is not None and answer.reason == Reason.SOURCE_NOT_FOUND


def _another(version: Version, lacking: list[str], observed: Observed) -> str | None:
    """One of the living nodes that have room and can be written to: where rollouts of its
    namespace are, before others; spread by UID.
    """
    ready = sorted(name for name in observed.states if observed.follows(name))
    # by a hash, so that sources are spread and a version's reader is the same in every pass
    first = int(hashlib.sha256(version.uid.encode()).hexdigest(), 16) % len(ready) if ready else 0
    able = (
        name
        for name in [*ready[first:], *ready[:first]]
        if name not in lacking
        and _has_room(observed.states[name], version)
        and not _has_refused(name, version, observed)
    )
    return min(able, key=lambda name: not _serves(observed.states[name], version), default=None)


def _serves(state: NodeState, version: Version) -> bool:
    """Whether the node has pods of the version's namespace, which load their model there."""
    return any(entry.namespace == version.namespace for entry in state.spec.rollouts)


def _why_nobody(version: Version, observed: Observed) -> str:
    """Why none of the agents that live can be asked."""
    alive = (name for name in sorted(observed.states) if observed.follows(name))
    refusing = next((name for name in alive if _has_refused(name, version, observed)), None)
    if refusing is not None:
        return (
            f"what node {refusing} is to read cannot be written: "
            f"{observed.refusals[version.uid, refusing].message}"
        )
    return (
        f"every agent has as many sources to read as it may, or {MAX_RESOLVE_OF_NAMESPACE} of this "
        "namespace: delete the WeightVersions whose sources cannot be read"
    )


def _has_refused(node: str, version: Version, observed: Observed) -> bool:
    refusal = observed.refusals.get((version.uid, node))
    return refusal is not None and not refusal.is_due


def _has_room(state: NodeState, version: Version) -> bool:
    """Whether a node may be asked for one more; no namespace takes all of it with sources that
    cannot be read.
    """
    own = sum(1 for item in state.spec.resolve if item.namespace == version.namespace)
    return len(state.spec.resolve) < MAX_RESOLVE and own < MAX_RESOLVE_OF_NAMESPACE


def _ask(
    version: Version, readers: list[str], asked: list[str], observed: Observed
) -> tuple[AskResolve, ...]:
    # from agents that went: when they come back they would read it as well
    withdrawn = _take_back(version, [name for name in asked if name not in readers], observed)
    reader = readers[-1]
    if reader in asked:  # it reads already
        return withdrawn
    item = ResolveItem(
        uid=version.uid,
        namespace=version.namespace,
        name=version.name,
        model=version.spec.model,
        version=version.spec.version,
        uri=version.spec.source.uri,
        digest=version.spec.manifest.digest if version.spec.manifest else "",
    )
    return (
        AskResolve(reader, observed.states[reader].resource_version, version.uid, item),
        *withdrawn,
    )


def _take_back(version: Version, nodes: list[str], observed: Observed) -> tuple[AskResolve, ...]:
    return tuple(
        AskResolve(name, observed.states[name].resource_version, version.uid, None)
        for name in nodes
    )


def _answer(state: NodeState, uid: str) -> ResolvedVersion | None:
    return next((found for found in state.status.resolved if found.uid == uid), None)


def _resolved(version: Version, answer: ResolvedVersion, now: datetime) -> VersionDecision:
    pinned = version.spec.manifest.digest if version.spec.manifest else ""
    # the agent compares too, but what is taken here is the version's identity for good
    if pinned and pinned != answer.digest:
        message = (
            f"the source holds {answer.digest}, but spec.manifest.digest pins {pinned}: "
            "publish it as a new version"
        )
        status = _status(version, now, "False", Reason.DIGEST_MISMATCH, message)
        return VersionDecision(
            status=status, events=_events(version, Reason.DIGEST_MISMATCH, message, warning=True)
        )
    found = version.status.model_copy(
        update={
            "digest": answer.digest,
            "nbytes": answer.nbytes,
            "size": sizes.binary(answer.nbytes),
            "tensors": answer.tensors,
            "chunks": answer.chunks,
        }
    )
    message = _found(found)
    return VersionDecision(
        status=_status(version, now, "True", "Resolved", message, found),
        events=_events(version, "Resolved", message, warning=False),
    )


def _found(status: WeightVersionStatus) -> str:
    return f"{status.tensors} tensors, {status.size}, digest {status.digest}"


def _failed(
    version: Version, answer: ResolvedVersion, reader: str, now: datetime
) -> VersionDecision:
    reason = answer.reason or "ResolveFailed"
    message = f"node {reader}: {answer.message or reason}"
    status = _status(version, now, "False", reason, message)
    return VersionDecision(status=status, events=_events(version, reason, message, warning=True))


# reasons that pass by themselves; every other one, an agent's own included, is a failure
_WAITING = frozenset({"Resolving", Reason.NO_AGENT, Reason.WAITS_FOR_AGENT, "Resolved"})


def is_failure(reason: str) -> bool:
    """Whether a reason of the condition Resolved means that somebody has to do something."""
    return reason not in _WAITING


def _status(
    version: Version,
    now: datetime,
    truth: str,
    reason: str,
    message: str,
    base: WeightVersionStatus | None = None,
) -> WeightVersionStatus:
    """The conditions Resolved and Ready, and kstatus' Reconciling or Stalled while they are
    False.
    """
    base = base or version.status
    states = {"Resolved": truth, "Ready": truth}
    if truth != "True":
        states["Stalled" if is_failure(reason) else "Reconciling"] = "True"
    # what does not hold any more goes: kstatus reads abnormal conditions by their presence
    conditions = [c for c in base.conditions if c.type in states]
    for type_, status in states.items():
        conditions = upsert(
            conditions,
            Condition.model_validate(
                {
                    "type": type_,
                    "status": status,
                    "observedGeneration": version.generation,
                    "lastTransitionTime": timestamps.show(now),
                    "reason": reason,
                    "message": message,
                }
            ),
        )
    return base.model_copy(
        update={"observed_generation": version.generation, "conditions": conditions}
    )


def _events(version: Version, reason: str, message: str, *, warning: bool) -> tuple[Event, ...]:
    """One event, only when the reason is new: the same is found in every pass."""
    if any(c.type == "Resolved" and c.reason == reason for c in version.status.conditions):
        return ()
    about = ObjectRef("WeightVersion", version.namespace, version.name, version.uid)
    return (Event(about, reason, message, warning),)
