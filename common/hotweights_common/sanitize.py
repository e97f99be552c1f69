"""Texts from elsewhere (an engine, a file, a peer), made fit to be logged and written to the
API.
"""

from __future__ import annotations

import math
import re

# docs/design/001-contracts.md: sha256 of the manifest's canonical bytes
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# at most 64, as much as the status takes of a reason
_REASON = re.compile(r"[A-Z][A-Za-z0-9]{0,63}")


def clip(text: str, most: int) -> str:
    """At most ``most`` characters, without control characters and lone surrogates; the end is
    marked when it was cut.
    """
    if len(text) <= most and text.isprintable():
        return text
    # one more than fits, so that it is seen that it was cut; the rest may be long and is not read
    printable = "".join(c if c.isprintable() else " " for c in text[: most + 1])
    return printable if len(printable) <= most else printable[: most - 1] + "…"


def is_digest(text: str) -> bool:
    """Whether it is written as digests are."""
    return _DIGEST.fullmatch(text) is not None


def reason_or(text: str, otherwise: str) -> str:
    """The text if it is one CamelCase word, as conditions want it."""
    return text if _REASON.fullmatch(text) else otherwise


def short(digest: str) -> str:
    """The first 16 hexadecimal digits: a label's value holds 63 characters, a digest has 71. Empty
    for no digest.
    """
    return digest.removeprefix("sha256:")[:16]


def finite(number: float) -> float:
    """The number, or 0 for what JSON cannot say or no duration can be."""
    return number if math.isfinite(number) and number >= 0 else 0.0
