"""What all models of custom resources share.

Objects in a cluster may come from a newer release, so unknown fields are ignored on reading (strict
twins would break a rollback of the operator); the samples and the tests parse with
``extra="forbid"`` through `strict`. Field names are snake_case here and camelCase in YAML; every
field has a description, because it is what ``kubectl explain`` prints.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

GROUP = "hotweights.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

DIGEST_PATTERN = r"^sha256:[0-9a-f]{64}$"
LABEL_VALUE_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"


def digest_label(digest: str) -> str:
    """The 16 hexadecimal digits that fit into the label hotweights.dev/digest; empty for no
    digest.
    """
    return digest.removeprefix("sha256:")[:16]  # a label's value has 63 characters at most


def camel(name: str) -> str:
    """``manifest_digest`` → ``manifestDigest``; the acronyms of Kubernetes stay whole (``pod_uid``
    → ``podUID``).
    """
    text = to_camel(name)
    for plain, whole in (("Uri", "URI"), ("Uid", "UID"), ("Id", "ID")):
        if text.endswith(plain):
            text = text.removesuffix(plain) + whole
    return text


class Model(BaseModel):
    """A frozen piece of a custom resource, with camelCase aliases."""

    model_config = ConfigDict(
        alias_generator=camel, populate_by_name=True, frozen=True, extra="ignore"
    )

    def to_dict(self) -> dict[str, Any]:
        """As it stands in YAML: camelCase names, absent where None."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> Self:
        """From what the API server sent."""
        return cls.model_validate(body)
