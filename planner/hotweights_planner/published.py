"""A manifest that lies away from the weights: the same JSON, and under ``source`` where the folder
is.

The source is no part of the version's identity, because the same version may lie anywhere; beside
the weights it is never written. It knows nothing of files.
"""

from __future__ import annotations

from typing import NamedTuple

import orjson

from hotweights_planner import manifest as manifests
from hotweights_planner.errors import BadManifest
from hotweights_planner.manifest import Manifest


class Published(NamedTuple):
    """A manifest, and where its folder is, if that is known."""

    manifest: Manifest
    source: str | None


def published_text(manifest: Manifest, source: str) -> bytes:
    """The manifest with its source."""
    return _spelled({**orjson.loads(manifest.canonical), "source": source})


def parse_published(text: bytes, where: str = manifests.FILE_NAME) -> Published:
    """A manifest in either form. Raises `BadManifest`, also for another spelling of one."""
    if not text.strip():
        raise BadManifest(where, "it is empty")
    try:
        body = orjson.loads(text)
        source = body.pop("source")
    except (ValueError, KeyError, AttributeError, TypeError):  # without one, or no manifest at all
        return Published(manifests.parse(text, where), None)
    if not isinstance(source, str):
        raise BadManifest(where, "its source is no JSON text")
    if _spelled({**body, "source": source}) != text:
        raise BadManifest(where, "its bytes are not in canonical form")
    return Published(manifests.parse(_spelled(body), where), source)


def _spelled(body: dict[str, object]) -> bytes:
    return orjson.dumps(body, option=orjson.OPT_SORT_KEYS)
