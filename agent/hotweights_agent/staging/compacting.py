"""What `hotweights_planner.compaction` decided, done with real memory: a new version takes over the
chunks that are here, and an older one moves out of the slabs that the new one left.

Both may be refused memory or descriptors. Then a version is begun without moving anything, and one
that would move stays where it is: compacting never costs anybody a version that would have fitted.
"""

from __future__ import annotations

import errno
import logging
import math
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from hotweights_planner.compaction import MAX_MAPPINGS, Compaction, Limits, compact
from hotweights_planner.layout import MAX_SLAB_NBYTES, Place
from hotweights_planner.manifest import Manifest
from hotweights_storage.errors import NoCapacity
from hotweights_storage.image import Image, ImageBuilder
from hotweights_storage.slab import Slab

log = logging.getLogger(__name__)

Chunks = Mapping[str, Place[Slab]]

# beside the version that an engine serves it maps this one when it goes back: together they leave
# a quarter of what Linux allows
MAX_OLDER_MAPPINGS = 2 * MAX_MAPPINGS


def plans(manifest: Manifest, known: Sequence[Chunks]) -> Iterator[Compaction[Slab]]:
    """How a version may take over chunks of others, the newest of which is the first: the best way
    first, and one that takes the least memory last.
    """
    limits = Limits(max_slab_nbytes=MAX_SLAB_NBYTES)
    # the second moves no older version
    for limit in (limits, replace(limits, max_waste=math.inf)):
        plan = compact(manifest, known, lambda slab: slab.stored_nbytes, limit)
        yield plan
        if not plan.leaves:
            break
    if plan.copies:
        yield Compaction(ChainMap(*map(dict, known)), {}, frozenset(), 0)


def build(
    manifest: Manifest, plan: Compaction[Slab], on_chunk: Callable[[str], None] | None = None
) -> ImageBuilder:
    """A builder that follows ``plan``. Raises `OSError`, and `NoCapacity` without descriptors."""
    try:
        return ImageBuilder(manifest, plan.stays, on_chunk, MAX_SLAB_NBYTES, plan.copies)
    except OSError as error:
        if error.errno not in {errno.EMFILE, errno.ENFILE}:
            raise
        raise NoCapacity(
            f"version {manifest.version} needs more open files than this process may have "
            f"({error.strerror}): raise the agent's limit (RLIMIT_NOFILE), or release a version on "
            "this node"
        ) from error


def moved(
    image: Image, plan: Compaction[Slab], free_nbytes: Callable[[], int]
) -> tuple[ImageBuilder, Image] | None:
    """The version of ``image`` in its new place. None: it stays where it is, and keeps what it has
    until it goes.
    """
    manifest = image.manifest
    try:
        with build(manifest, plan) as builder:
            builder.config = image.config
            if builder.mapping_count > MAX_OLDER_MAPPINGS or builder.new_nbytes > free_nbytes():
                return None
            return builder, builder.finish()
    except (OSError, NoCapacity) as error:
        log.warning("version %s keeps its old place: %s", manifest.version, error)
        return None
