"""Label selectors as in meta/v1
(https://kubernetes.io/docs/concepts/overview/working-with-objects/labels). Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from hotweights_crds.weightrollout import LabelSelector, Requirement


def selects(selector: LabelSelector, labels: Mapping[str, str]) -> bool:
    """Whether all requirements hold; an empty selector selects everything."""
    return all(labels.get(key) == value for key, value in selector.match_labels.items()) and all(
        _satisfies(requirement, labels) for requirement in selector.match_expressions
    )


def _satisfies(requirement: Requirement, labels: Mapping[str, str]) -> bool:
    match requirement.operator:
        case "In":
            return labels.get(requirement.key) in requirement.values
        case "NotIn":
            # also where the label is missing, as in meta/v1
            return labels.get(requirement.key) not in requirement.values
        case "Exists":
            return requirement.key in labels
        case "DoesNotExist":
            return requirement.key not in labels
