"""What the planner refuses, and how it says so.

    Refused                something that came from outside is not usable
    ├── BadCheckpoint      a weights file or a checkpoint folder
    ├── BadManifest        a manifest
    ├── BadPlan            a plan
    └── BadGroups          a group map, or tensor-parallel groups

Each says where, what is wrong and what to do about it; ``reason`` is the CamelCase word that ends
up in conditions. What came from outside is shown in ASCII and cut, here and wherever it is refused:
an error is a line to read.
"""

from __future__ import annotations

from hotweights_common.errors import HotweightsError
from hotweights_common.reasons import Reason


class Refused(HotweightsError, ValueError):
    """Input that is not usable: ``where`` it is, ``what`` is wrong with it and the ``remedy``, or
    its class's `default_remedy`.
    """

    reason = Reason.REFUSED
    default_remedy = ""

    def __init__(self, where: str, what: str, remedy: str = "") -> None:
        self.where = where
        self.what = what
        self.remedy = remedy or self.default_remedy
        super().__init__(f"{where}: {what}" + (f"; {self.remedy}" if self.remedy else ""))


class BadCheckpoint(Refused):
    """A checkpoint that is not to be trusted or not to be understood."""

    reason = Reason.BAD_CHECKPOINT
    default_remedy = "write the checkpoint again with safetensors, or copy it again"


class BadManifest(Refused):
    """A manifest that is not to be trusted or not to be understood."""

    reason = Reason.BAD_MANIFEST
    default_remedy = "write it again with `hotweights publish`"


class BadPlan(Refused):
    """A plan that is not to be trusted or not to be understood, or that nobody may make."""

    reason = Reason.BAD_PLAN
    default_remedy = "make it again with `hotweights plan`"


class BadGroups(Refused):
    """A group map or tensor-parallel groups that say nothing usable."""

    reason = Reason.BAD_GROUPS
    default_remedy = "write a JSON object of lists of ranks"
