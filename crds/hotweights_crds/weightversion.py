"""WeightVersion: one immutable version of a model's weights, and where its bytes are."""

from __future__ import annotations

from pydantic import Field

from hotweights_crds.base import DIGEST_PATTERN, LABEL_VALUE_PATTERN, Model
from hotweights_crds.conditions import Condition
from hotweights_crds.structural import cel, list_map

SOURCE_PREFIXES = ("file:///", "pvc://")
"""What a source's URI begins with, one of them."""


class Source(Model):
    """Where a checkpoint is read from."""

    uri: str = Field(
        description="file:///path under a root that the installation allows for this namespace, or "
        "pvc://claim/path.",
        min_length=1,
        max_length=1024,
        json_schema_extra=cel(
            " || ".join(f"self.startsWith('{prefix}')" for prefix in SOURCE_PREFIXES),
            "write file:///absolute/path or pvc://claim/path",
        ),
    )


class ManifestRef(Model):
    """The manifest that the bytes are checked against."""

    digest: str = Field(
        description="sha256 of the manifest, as `hotweights publish` prints it. Without it, what "
        "the source holds when the version is resolved counts.",
        max_length=71,
        json_schema_extra=cel(
            f"self.matches('{DIGEST_PATTERN}')",
            "write sha256: and 64 hexadecimal digits, as `hotweights publish` prints them",
        ),
    )


class WeightVersionSpec(Model):
    """What the version is. Immutable: publish a new WeightVersion instead."""

    model: str = Field(
        description="Name of the model that these weights belong to.",
        max_length=63,
        json_schema_extra=cel(
            f"self.matches('{LABEL_VALUE_PATTERN}')",
            "a model name has at most 63 letters, digits, '.', '_' or '-', and begins and "
            "ends with a letter or digit",
        ),
    )
    version: str = Field(
        description="Name of the version; pods that serve it carry it as the label "
        "hotweights.dev/version.",
        max_length=63,
        json_schema_extra=cel(
            f"self.matches('{LABEL_VALUE_PATTERN}')",
            "a version is a label value: at most 63 letters, digits, '.', '_' or '-', and "
            "begins and ends with a letter or digit",
        ),
    )
    source: Source = Field(description="Where the checkpoint is read from.")
    manifest: ManifestRef | None = Field(default=None, description="Pins the content.")


class WeightVersionStatus(Model):
    """What is known about the version."""

    observed_generation: int = Field(
        default=0, description="The generation that this status speaks of."
    )
    digest: str = Field(
        default="", description="The manifest's digest: the version's identity.", max_length=71
    )
    nbytes: int = Field(default=0, description="Bytes of all tensors.")
    size: str = Field(default="", description="The same for people.", max_length=16)
    tensors: int = Field(default=0, description="Number of tensors.")
    chunks: int = Field(default=0, description="Number of chunks.")
    conditions: list[Condition] = Field(
        default_factory=list,
        description="Resolved: the source was read and has this digest. Ready: rollouts can use "
        "the version.",
        max_length=8,
        json_schema_extra=list_map("type"),
    )
