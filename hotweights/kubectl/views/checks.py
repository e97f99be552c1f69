"""What is wrong with an installation, a pod or a source, and how to put it right.

Each check is a function of `Facts`, and a row of `CHECKS`; it yields findings, and nothing when all
is well. What may not be read is a finding too: a doctor that saw nothing must not say that all is
well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hotweights.kubectl.views.snapshot import Snapshot
from hotweights_crds import v1alpha1
from hotweights_crds.base import VERSION as API_RELEASE
from hotweights_crds.conditions import find, is_true
from hotweights_kube.resources import Body
from hotweights_operator.decide import rollouts as decisions
from hotweights_operator.model.objects import GATE

Level = Literal["Error", "Warning", "Unknown"]
COMPONENT = "app.kubernetes.io/component"
VERSION = "app.kubernetes.io/version"
MOST_FAILURES = 5  # of one rollout; its status has twenty


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be."""

    level: Level  # Unknown: it could not be looked at
    subject: str  # kind and name
    message: str
    remedy: str

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Right:
    """Something that the caller needs to be allowed."""

    verb: str
    group: str
    resource: str
    why: str


@dataclass(frozen=True, slots=True)
class Facts:
    """All that was read. None: it may not be read, or the cluster has no such kind."""

    snapshot: Snapshot
    release: str  # of this plugin
    definitions: Sequence[Body] | None = None
    deployments: Sequence[Body] | None = None
    daemon_sets: Sequence[Body] | None = None
    mutating_policies: Sequence[Body] | None = None
    validating_policies: Sequence[Body] | None = None
    pods: Sequence[Body] = ()  # those with the inject label, whole
    refused: Sequence[Right] = ()
    absent: frozenset[str] = field(
        default_factory=frozenset
    )  # kinds that the cluster does not have


def examine(facts: Facts) -> list[Finding]:
    """All findings, the gravest first."""
    order: dict[Level, int] = {"Error": 0, "Warning": 1, "Unknown": 2}
    found = [finding for check in CHECKS for finding in check(facts)]
    return sorted(found, key=lambda finding: order[finding.level])


# -- the installation ---------------------------------------------------------------------------


def definitions(facts: Facts) -> Iterator[Finding]:
    """The definitions, served, and of this release."""
    if facts.definitions is None:
        yield _unread("CustomResourceDefinitions", "get customresourcedefinitions")
        return
    there = {body["metadata"]["name"]: body for body in facts.definitions}
    for kind in v1alpha1.KINDS:
        subject = f"CustomResourceDefinition {kind.crd_name}"
        body = there.get(kind.crd_name)
        if body is None:
            yield Finding(
                "Error", subject, "it is not installed", "install the chart, helm/hotweights"
            )
            continue
        if not _is(body, "Established"):
            yield Finding(
                "Error",
                subject,
                "it is not Established",
                "see its conditions: kubectl describe crd",
            )
        ours = _fields(v1alpha1.definition(kind))
        theirs = _fields(body)
        if missing := sorted(ours - theirs):
            yield Finding(
                "Error",
                subject,
                f"it lacks {_some(missing)}: it is older than this plugin, and the API server drops "
                "what it does not know",
                "helm upgrade the chart of this release, which brings its definitions",
            )
        if more := sorted(theirs - ours):
            yield Finding(
                "Warning",
                subject,
                f"it has {_some(more)}, which this plugin does not know",
                "install the plugin of the cluster's release",
            )


def operator(facts: Facts) -> Iterator[Finding]:
    """One Deployment with one pod that is Ready."""
    if facts.deployments is None:
        yield _unread("Deployments", "list deployments in all namespaces")
        return
    found = [b for b in facts.deployments if _label(b, COMPONENT) == "operator"]
    if not found:
        yield Finding(
            "Error",
            "the operator",
            "there is no Deployment of it",
            "install the chart, helm/hotweights",
        )
    if len(found) > 1:
        names = ", ".join(map(_name, found))
        yield Finding(
            "Error",
            "the operator",
            f"there are {len(found)}, which decide against each other: {names}",
            "uninstall all but one",
        )
    for body in found:
        if not (body.get("status") or {}).get("readyReplicas"):
            yield Finding(
                "Error",
                f"Deployment {_name(body)}",
                "no operator is Ready: rollouts stand still, and commands are not answered; pods "
                "serve on",
                f"kubectl logs -n {body['metadata']['namespace']} deployment/"
                f"{body['metadata']['name']}",
            )


def agents(facts: Facts) -> Iterator[Finding]:
    """A DaemonSet whose pods are Ready on every node that it is for."""
    if facts.daemon_sets is None:
        yield _unread("DaemonSets", "list daemonsets in all namespaces")
        return
    found = [b for b in facts.daemon_sets if _label(b, COMPONENT) == "agent"]
    if not found:
        yield Finding(
            "Error",
            "the agents",
            "there is no DaemonSet of them",
            "install the chart, helm/hotweights",
        )
    for body in found:
        status = body.get("status") or {}
        wanted, ready = status.get("desiredNumberScheduled", 0), status.get("numberReady", 0)
        if ready < wanted:
            yield Finding(
                "Error",
                f"DaemonSet {_name(body)}",
                f"{ready} of {wanted} agents are Ready",
                f"kubectl get pods -n {body['metadata']['namespace']} -l {COMPONENT}=agent -o wide",
            )


def releases(facts: Facts) -> Iterator[Finding]:
    """Operator, agents and this plugin are of one release."""
    said: dict[str, set[str]] = {}
    for body in [*(facts.deployments or ()), *(facts.daemon_sets or ())]:
        component = _label(body, COMPONENT)
        if component in ("operator", "agent") and _label(body, VERSION):
            said.setdefault(_label(body, VERSION), set()).add(f"the {component} of the chart")
    for state in facts.snapshot.states or ():
        if state.status.agent_version:
            said.setdefault(state.status.agent_version, set()).add(f"the agent on {state.name}")
    said.setdefault(facts.release, set()).add("this plugin")
    if len(said) > 1:
        text = "; ".join(
            f"{release}: {_some(sorted(who))}" for release, who in sorted(said.items())
        )
        yield Finding(
            "Warning",
            "releases",
            f"several run beside each other: {text}",
            "an upgrade goes on, or stopped half-way: kubectl rollout status of the agents' DaemonSet",
        )


def policies(facts: Facts) -> Iterator[Finding]:
    """The admission policies that inject and check pods."""
    if "MutatingAdmissionPolicy" in facts.absent:
        yield Finding(
            "Warning",
            "MutatingAdmissionPolicy",
            "this cluster has no such kind (Kubernetes before 1.36): the label alone injects nothing",
            "write the lines of config/samples/manual-injection.yaml into the pod templates",
        )
    elif facts.mutating_policies is None:
        yield _unread("MutatingAdmissionPolicies", "list mutatingadmissionpolicies")
    elif not any(_ours(body, "-inject") for body in facts.mutating_policies):
        yield Finding(
            "Error",
            "the policy hotweights-inject",
            "it is not installed: pods with the label are made without the plugin",
            "helm upgrade with inject.enabled=true; `helm template` needs --api-versions "
            "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy",
        )
    if facts.validating_policies is None:
        yield _unread("ValidatingAdmissionPolicies", "list validatingadmissionpolicies")
    elif not any(_ours(body, "-inject-check") for body in facts.validating_policies):
        yield Finding(
            "Warning",
            "the policy hotweights-inject-check",
            "it is not installed: pods that can never follow are not refused",
            "helm upgrade the chart",
        )


def rights(facts: Facts) -> Iterator[Finding]:
    """What the caller may do."""
    for right in facts.refused:
        plural = f"{right.resource}.{right.group}" if right.group else right.resource
        yield Finding(
            "Warning",
            "your rights",
            f"you may not {right.verb} {plural}: {right.why}",
            "ask for the ClusterRole view, or edit to steer, which the chart aggregates to "
            "(rbac.aggregate)",
        )
    if words := facts.snapshot.unreadable():
        yield _unread(", ".join(words), "list them in all namespaces")


# -- what users made ----------------------------------------------------------------------------


def nodes(facts: Facts) -> Iterator[Finding]:
    """Every node with opted-in pods has an agent that speaks."""
    shot = facts.snapshot
    if shot.pods is None or shot.states is None:
        return
    observed = shot.observed()
    for name in sorted({pod.node for pod in shot.pods if pod.live and pod.node}):
        if observed.follows(name):
            continue
        node, subject = observed.nodes.get(name), f"node {name}"
        if node is not None and not node.ready:
            yield Finding("Error", subject, "it is not Ready", f"kubectl describe node {name}")
        elif not observed.has_agent(name):
            yield Finding(
                "Error",
                subject,
                "it has opted-in pods and no agent",
                "let the DaemonSet run there: agent.nodeSelector and agent.tolerations of the chart",
            )
        else:
            yield Finding(
                "Error",
                subject,
                "its agent is not Ready, or has said nothing yet",
                f"kubectl logs of the pod with {COMPONENT}=agent on {name}",
            )


def pods(facts: Facts) -> Iterator[Finding]:
    """Every opted-in pod has the gate, and an engine that is connected."""
    observed = facts.snapshot.observed()
    for body in facts.pods:
        subject = f"pod {_name(body)}"
        spec, uid = body.get("spec") or {}, body["metadata"]["uid"]
        gates = [gate.get("conditionType") for gate in spec.get("readinessGates") or ()]
        if GATE not in gates:
            yield Finding(
                "Error",
                subject,
                f"it has the label and not the readiness gate {GATE}: it was made before the chart "
                "was installed, or without its policy",
                "restart its Deployment: kubectl rollout restart",
            )
            continue
        pod = observed.pods.get(uid)
        if pod is None or not pod.live or not pod.node or not observed.follows(pod.node):
            continue  # `nodes` says why
        target = observed.target(uid)
        if facts.snapshot.states is not None and not target.connected:
            said = target.engine.message if target.engine else ""
            yield Finding(
                "Error",
                subject,
                said or "its engine is not connected to the node's agent",
                "it still starts, or runs without the plugin: its log names the plugin when vLLM "
                "starts (docs/troubleshooting.md)",
            )
        elif target.engine is not None and target.engine.phase in ("Failed", "Refused", "Dirty"):
            engine = target.engine
            yield Finding(
                "Error",
                subject,
                f"{engine.phase}: {engine.reason}: {engine.message}",
                f"look {engine.reason or 'it'} up in docs/troubleshooting.md",
            )


def versions(facts: Facts) -> Iterator[Finding]:
    """Every WeightVersion is resolved: its source was read."""
    for version in facts.snapshot.versions or ():
        resolved = find(version.status.conditions, "Resolved")
        if resolved is not None and resolved.status == "True":
            continue
        reason = resolved.reason if resolved else "NotObserved"
        message = resolved.message if resolved else "the operator has not looked at it yet"
        yield Finding(
            "Error" if resolved is not None and resolved.status == "False" else "Warning",
            f"WeightVersion {version.namespace}/{version.name}",
            f"{reason}: {message} (source {version.spec.source.uri})",
            f"look {reason} up in docs/troubleshooting.md",
        )


def sources(facts: Facts) -> Iterator[Finding]:
    """What nodes could not fetch."""
    for state in facts.snapshot.states or ():
        for staged in state.status.staged:
            if staged.phase == "Failed":
                yield Finding(
                    "Error",
                    f"node {state.name}",
                    f"it cannot stage {staged.version or staged.digest}: {staged.reason}: "
                    f"{staged.message}",
                    f"look {staged.reason or 'StagingFailed'} up in docs/troubleshooting.md",
                )


def rollouts(facts: Facts) -> Iterator[Finding]:
    """No rollout is stalled, in conflict with another one, or without an answer to a command."""
    observed = facts.snapshot.observed()
    for rollout in facts.snapshot.rollouts:
        subject, status = f"WeightRollout {rollout.namespace}/{rollout.name}", rollout.status
        if status.observed_generation < rollout.generation:
            yield Finding(
                "Warning",
                subject,
                "the operator has not looked at its spec yet",
                "wait a moment; else see the operator's log",
            )
        stalled = find(status.conditions, "Stalled")
        conflicts = decisions.conflicts(rollout, observed)
        if conflicts:
            yield Finding(
                "Error",
                subject,
                f"{len(conflicts)} of its pods belong to the older WeightRollout {conflicts[0][1].name}",
                "change one of the two selectors, or delete one of the two",
            )
        elif stalled is not None and is_true(status.conditions, "Stalled"):
            yield Finding(
                "Error",
                subject,
                f"{stalled.reason}: {stalled.message}",
                f"kubectl hotweights retry {rollout.name}, or rollback, when its cause is mended",
            )
        for failure in status.failures[:MOST_FAILURES]:
            yield Finding(
                "Error",
                f"pod {rollout.namespace}/{failure.pod}" if failure.pod else f"node {failure.node}",
                f"it does not follow {rollout.name}: {failure.reason}: {failure.message}",
                f"look {failure.reason} up in docs/troubleshooting.md",
            )
        if rollout.command and rollout.command != status.last_command.text:
            yield Finding(
                "Warning",
                subject,
                f"the command {rollout.command!r} is not answered",
                "the operator answers within a moment where it runs",
            )
    for why in facts.snapshot.malformed:
        yield Finding("Error", "objects", why, "install the plugin of the cluster's release")


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    definitions,
    operator,
    agents,
    policies,
    nodes,
    versions,
    sources,
    rollouts,
    pods,
    releases,
    rights,
)


# -- helpers ------------------------------------------------------------------------------------


def _unread(what: str, right: str) -> Finding:
    return Finding("Unknown", what, "you may not read them, so nothing is known", f"ask to {right}")


def _label(body: Body, key: str) -> str:
    return str((body["metadata"].get("labels") or {}).get(key, ""))


def _name(body: Body) -> str:
    metadata = body["metadata"]
    namespace = metadata.get("namespace")
    return f"{namespace}/{metadata['name']}" if namespace else str(metadata["name"])


def _ours(body: Body, ending: str) -> bool:
    return _label(body, "app.kubernetes.io/name") == "hotweights" and str(
        body["metadata"]["name"]
    ).endswith(ending)


def _is(body: Body, condition: str) -> bool:
    several = (body.get("status") or {}).get("conditions") or ()
    return any(c.get("type") == condition and c.get("status") == "True" for c in several)


def _fields(definition: Body) -> set[str]:
    """Every field of our version's schema, by its path."""
    for version in definition["spec"]["versions"]:
        if version["name"] == API_RELEASE:
            schema = version["schema"]["openAPIV3Schema"]["properties"]
            return {
                path for part in ("spec", "status") for path in _paths(schema.get(part) or {}, part)
            }
    return set()


def _paths(schema: Mapping[str, Any], at: str) -> Iterator[str]:
    yield at
    inner = schema.get("items") or schema
    for name, below in (inner.get("properties") or {}).items():
        yield from _paths(below, f"{at}.{name}")


def _some(names: Sequence[str]) -> str:
    """The first three, and how many more."""
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")
