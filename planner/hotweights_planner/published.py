"""A manifest that lies away from the weights: the same JSON, and under ``source`` where the folder
is.

The source is no part of the version's identity, because the same version may lie anywhere; beside
the weights it is never written. It knows nothing of files.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from hotweights_planner import manifest as manifests
from hotweights_planner.errors import BadManifest
from hotweights_planner.manifest import Manifest

# In canonical JSON these bytes stand nowhere else: within a string the quotes would be escaped.
_SOURCE = re.compile(rb',"source":("(?:[^"\\]|\\.)*")(?=,"tensors":)')
_BEFORE = b',"tensors":'


class Published(NamedTuple):
    """A manifest, and where its folder is, if that is known."""

    manifest: Manifest
    source: str | None


def published_text(manifest: Manifest, source: str) -> bytes:
    """The manifest's bytes with ``source``, the URI of its folder, where sorted keys put it: right
    before the tensors.
    """
    head, tensors, rest = manifest.canonical.partition(_BEFORE)
    return head + b',"source":' + json.dumps(source, ensure_ascii=False).encode() + tensors + rest


def parse_published(text: bytes, where: str = manifests.FILE_NAME) -> Published:
    """A manifest in either form, with or without its source. Raises `BadManifest`."""
    if not text.strip():  # "not JSON" would not tell that the file has nothing in it
        raise BadManifest(where, "it is empty")
    # the source is cut out of the bytes: what is left must be canonical to the letter
    found = _SOURCE.search(text)
    if found is None:
        return Published(manifests.parse(text, where), None)
    try:
        source = json.loads(found[1])
    except ValueError as error:
        raise BadManifest(where, f"its source is no JSON text: {error}") from error
    return Published(manifests.parse(text[: found.start()] + text[found.end() :], where), source)
