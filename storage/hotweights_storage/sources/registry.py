"""The kinds of sources that there are: found, not listed. One more is one more module of this
package, with `OPENERS`: by scheme, what makes an `Opener` of the roots that may be read. Agents take
what there is; which schemes a WeightVersion may name says its rule in ``hotweights_crds``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence

from hotweights_storage import sources
from hotweights_storage.sources.base import Opener, Root, Sources


def kinds() -> Mapping[str, Callable[[Sequence[Root]], Opener]]:
    """By scheme, what makes an opener."""
    found: dict[str, Callable[[Sequence[Root]], Opener]] = {}
    for module in pkgutil.iter_modules(sources.__path__, f"{sources.__name__}."):
        found |= getattr(importlib.import_module(module.name), "OPENERS", {})
    return found


def installed(roots: Sequence[Root]) -> Sources:
    """All kinds of sources, open as far as the roots allow."""
    return Sources({scheme: make(roots) for scheme, make in kinds().items()})
