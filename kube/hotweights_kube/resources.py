"""Which resources we speak about, and where the API server keeps them. Pure: paths in, paths
out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from hotweights_crds.base import API_VERSION

Body = dict[str, Any]
"""An object as it stands in JSON."""


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of object: its API version and the plural under which it is served."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool = True

    def path(
        self, namespace: str | None = None, name: str | None = None, subresource: str | None = None
    ) -> str:
        """The URL path of an object, or of the collection without a name (of all namespaces without
        a namespace).
        """
        root = "/api" if "/" not in self.api_version else "/apis"  # the core group has no name
        parts = [root, self.api_version]
        if namespace and self.namespaced:
            parts += ["namespaces", quote(namespace, safe="")]
        parts.append(self.plural)
        parts += [quote(part, safe="") for part in (name, subresource) if part]
        return "/".join(parts)


PODS = Resource("v1", "Pod", "pods")
NODES = Resource("v1", "Node", "nodes", namespaced=False)
NAMESPACES = Resource("v1", "Namespace", "namespaces", namespaced=False)
EVENTS = Resource("events.k8s.io/v1", "Event", "events")
TOKEN_REVIEWS = Resource(
    "authentication.k8s.io/v1", "TokenReview", "tokenreviews", namespaced=False
)
CUSTOM_RESOURCE_DEFINITIONS = Resource(
    "apiextensions.k8s.io/v1",
    "CustomResourceDefinition",
    "customresourcedefinitions",
    namespaced=False,
)
WEIGHT_VERSIONS = Resource(API_VERSION, "WeightVersion", "weightversions")
WEIGHT_ROLLOUTS = Resource(API_VERSION, "WeightRollout", "weightrollouts")
NODE_WEIGHTS = Resource(API_VERSION, "NodeWeights", "nodeweights")


def name_of(body: Body) -> str:
    """namespace/name, or the name alone, for messages."""
    metadata = body.get("metadata", {})
    namespace, name = metadata.get("namespace"), metadata.get("name", "")
    return f"{namespace}/{name}" if namespace else str(name)


def version_of(body: Body) -> str:
    """The object's or the list's resourceVersion; empty when it has none."""
    return str(body.get("metadata", {}).get("resourceVersion", ""))


def newer(left: Body, right: Body) -> bool:
    """Whether ``left`` is a later state of the same object than ``right``.

    Kubernetes promises since 1.35 that the resourceVersions of one resource compare as integers
    (KEP-5504), and every etcd-backed server did before. Raises `ValueError` where they do not.
    """
    return int(version_of(left) or 0) > int(version_of(right) or 0)
