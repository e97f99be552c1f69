"""The three custom resources of ``hotweights.dev/v1alpha1``, and their definitions as the API
server takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from hotweights_crds.base import GROUP, VERSION
from hotweights_crds.nodeweights import NodeWeightsSpec, NodeWeightsStatus
from hotweights_crds.structural import structural
from hotweights_crds.weightrollout import WeightRolloutSpec, WeightRolloutStatus
from hotweights_crds.weightversion import WeightVersionSpec, WeightVersionStatus

Column = tuple[str, str, str, int]  # name, type, path, priority (0: always shown, 1: with -o wide)


@dataclass(frozen=True, slots=True)
class Kind:
    """One custom resource: its names, its models and its printer columns."""

    kind: str
    plural: str
    short_names: tuple[str, ...]
    description: str
    spec: type[BaseModel]
    status: type[BaseModel]
    columns: tuple[Column, ...]
    rules: tuple[dict[str, str], ...] = ()  # on the whole object

    @property
    def crd_name(self) -> str:
        """Name of its CustomResourceDefinition, as the API server demands it: plural and group."""
        return f"{self.plural}.{GROUP}"


_READY = ".status.conditions[?(@.type=='Ready')]"

WEIGHT_VERSION = Kind(
    kind="WeightVersion",
    plural="weightversions",
    short_names=("wver",),
    description="One immutable version of a model's weights, and where its bytes are.",
    spec=WeightVersionSpec,
    status=WeightVersionStatus,
    columns=(
        ("Model", "string", ".spec.model", 0),
        ("Version", "string", ".spec.version", 0),
        ("Size", "string", ".status.size", 0),
        ("Ready", "string", f"{_READY}.status", 0),
        ("Reason", "string", f"{_READY}.reason", 0),
        ("Age", "date", ".metadata.creationTimestamp", 0),
        ("Digest", "string", ".status.digest", 1),
        ("Source", "string", ".spec.source.uri", 1),
    ),
)

WEIGHT_ROLLOUT = Kind(
    kind="WeightRollout",
    plural="weightrollouts",
    short_names=("wroll",),
    description="Which version of the weights the selected vLLM pods are to serve, and how they "
    "get there.",
    spec=WeightRolloutSpec,
    status=WeightRolloutStatus,
    columns=(
        ("Version", "string", ".status.target.version", 0),
        ("Phase", "string", ".status.phase", 0),
        ("Desired", "integer", ".status.pods.desired", 0),
        ("Updated", "integer", ".status.pods.updated", 0),
        ("Ready", "integer", ".status.pods.ready", 0),
        ("Staged", "string", ".status.nodes.summary", 0),
        ("Age", "date", ".metadata.creationTimestamp", 0),
        ("Previous", "string", ".status.previous.version", 1),
        ("Strategy", "string", ".spec.strategy.type", 1),
        ("Failed", "integer", ".status.pods.failed", 1),
        ("Golden", "integer", ".status.pods.golden", 1),
        ("Rollback", "string", ".status.rollback", 1),
        ("Message", "string", ".status.message", 1),
    ),
)

NODE_WEIGHTS = Kind(
    kind="NodeWeights",
    plural="nodeweights",
    short_names=("nw",),
    description="What one node is to hold and serve, and what it does hold and serve.",
    spec=NodeWeightsSpec,
    status=NodeWeightsStatus,
    columns=(
        ("Engines", "string", ".status.summary", 0),
        ("Free", "string", ".status.capacity.free", 0),
        ("Ready", "string", f"{_READY}.status", 0),
        ("Age", "date", ".metadata.creationTimestamp", 0),
        ("Endpoint", "string", ".status.endpoint", 1),
        ("Agent", "string", ".status.agentVersion", 1),
    ),
)

KINDS = (WEIGHT_VERSION, WEIGHT_ROLLOUT, NODE_WEIGHTS)


def definition(kind: Kind) -> dict[str, Any]:
    """The CustomResourceDefinition of a kind, as it is written to YAML. Raises
    `structural.NotStructural` when a model uses what a custom resource cannot express.
    """
    spec = structural(kind.spec)
    if kind is WEIGHT_VERSION:
        spec["x-kubernetes-validations"] = [
            {
                "rule": "self == oldSelf",
                "message": "a WeightVersion is immutable: create another one and point the rollout at it",
            }
        ]
    status = {
        "description": "What is observed.",
        **structural(kind.status),
        # until somebody has looked at the object: kstatus then takes it for in progress
        "default": {"observedGeneration": -1},
    }
    schema = {
        "type": "object",
        "description": kind.description,
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}."},
            "kind": {"type": "string", "description": f"{kind.kind}."},
            "metadata": {"type": "object"},
            "spec": {**spec, "description": "What is wanted."},
            "status": {**status, "description": "What is observed."},
        },
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": kind.crd_name},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind.kind,
                "listKind": f"{kind.kind}List",
                "plural": kind.plural,
                "singular": kind.kind.lower(),
                "shortNames": list(kind.short_names),
                "categories": ["weights"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": schema},
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {
                            "name": name,
                            "type": type_,
                            "jsonPath": path,
                            **({"priority": priority} if priority else {}),
                        }
                        for name, type_, path, priority in kind.columns
                    ],
                }
            ],
        },
    }
