"""``{{args.name}}`` and the names that need no argument, replaced in whatever a metric says.

What looks like a name and is none is an error: a query for a version that is called
"{{canary-verson}}" finds nothing, and nobody would know why. What begins with a dot or a sign is
left alone, since a Job's script may be a template of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hotweights_crds.analysis import Metric
from hotweights_crds.base import digest_label
from hotweights_crds.weightrollout import VersionStatus
from hotweights_operator.model.objects import Rollout

_PLACE = re.compile(r"\{\{ *([A-Za-z][A-Za-z0-9.-]*) *\}\}")


class UnknownArgument(ValueError):
    """A name that nothing was given for."""


def built_in(rollout: Rollout, stable: VersionStatus, target: VersionStatus) -> dict[str, str]:
    """The names that need no argument. What is stable is empty while nothing was complete: so is the
    label of pods that serve what they booted, which PromQL takes for the same.
    """
    return {
        "namespace": rollout.namespace,
        "rollout": rollout.name,
        "stable-version": stable.version,
        "canary-version": target.version,
        "stable-digest": digest_label(stable.digest),
        "canary-digest": digest_label(target.digest),
    }


def filled(metric: Metric, names: Mapping[str, str]) -> Metric:
    """The metric with every name replaced. Raises `UnknownArgument`."""
    return Metric.from_dict(_filled(metric.to_dict(), names))


def _filled(value: Any, names: Mapping[str, str]) -> Any:
    match value:
        case str():
            return _PLACE.sub(lambda found: _named(found[1], names), value)
        case dict():
            return {key: _filled(item, names) for key, item in value.items()}
        case list():
            return [_filled(item, names) for item in value]
        case _:
            return value


def _named(name: str, names: Mapping[str, str]) -> str:
    if name not in names:
        raise UnknownArgument(
            f"{{{{{name}}}}} stands for nothing: give it under args, or write one of "
            f"{', '.join(sorted(names))}"
        )
    return names[name]
