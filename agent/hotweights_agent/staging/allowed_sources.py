"""The sources that this installation allows, as the settings name them."""

from __future__ import annotations

from collections.abc import Sequence

from hotweights_agent.settings import RootSettings
from hotweights_storage.sources.base import Source, Sources
from hotweights_storage.sources.file import ANY_NAMESPACE, Claim, ClaimOpener, FileOpener, Root


class _Claims:
    """Opens ``pvc://`` for every namespace that the settings open a claim to."""

    def __init__(self, roots: Sequence[RootSettings]) -> None:
        self._roots = roots

    def open(self, uri: str, namespace: str) -> Source:
        """The folder in the claim, if the namespace may read it."""
        claims = [
            Claim(namespace, root.claim, root.path)
            for root in self._roots
            if namespace in root.namespaces or ANY_NAMESPACE in root.namespaces
        ]
        return ClaimOpener(claims).open(uri, namespace)


def allowed(roots: Sequence[RootSettings]) -> Sources:
    """What may be read, and by whose objects."""
    files = [Root(root.path, root.namespaces) for root in roots if not root.claim]
    claims = [root for root in roots if root.claim]
    return Sources({"file": FileOpener(files), "pvc": _Claims(claims)})
