"""The sources that this installation allows, as the settings name them."""

from __future__ import annotations

from collections.abc import Sequence

from hotweights_agent.settings import RootSettings
from hotweights_storage.sources.base import Root, Sources
from hotweights_storage.sources.registry import installed


def allowed(roots: Sequence[RootSettings]) -> Sources:
    """What may be read, and by whose objects."""
    return installed([Root(root.path, root.namespaces, root.claim) for root in roots])
