"""Whether two ``config.json`` mean the same model, and where they differ.

A trainer with another transformers writes the same configuration in other bytes: who wrote it, from
which path, and ``dtype`` where it was ``torch_dtype``. vLLM reads the file through transformers, so
what that ignores is left out here, and nothing else: an unknown key, a default that one file spells
out and the other leaves to the code, are differences.

Taken from transformers 5.19, ``configuration_utils.py``, whose lists a newer one has to be compared
with: ``PreTrainedConfig.__post_init__`` (``torch_dtype`` is ``dtype`` where that is null;
``_commit_hash`` "is not used anymore") and ``to_dict`` (``transformers_version`` is overwritten
with the running one's; it is read by the tokenizer of Mistral's models alone, for which side of 5.0
it lies on: ``tokenization_utils_tokenizers.py``, ``_patch_mistral_regex``). ``_name_or_path``,
where a save of an older release came from, is not written any more; vLLM's Phi4MM hands it on as
the place of its own image encoder, which an engine that runs has built.

The order of keys means nothing, but in what is said of quantization: there the first pattern that
fits a layer counts. A number is another where its type is: transformers refuses 64.0 for a size,
and vLLM asks whether a rope's factor is a float.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

MAX_NBYTES = 1 << 20  # a parsed file takes some ten times as much, in the serving process
MOST_SHOWN = 3
_MOST_CHARACTERS = 40  # of a value
_INFORMATION = frozenset({"transformers_version", "_name_or_path", "_commit_hash"})
_ASKED_FOR_VERSION = frozenset({"mistral", "mistral3", "ministral", "pixtral", "voxtral"})
_ORDERED = frozenset({"quantization_config", "compression_config"})


def differences(old: str, new: str) -> list[str] | None:
    """``key: old → new`` for each that differs, in the order of the keys; none: both mean the same.
    None: one of them is no JSON object, so nobody can say.
    """
    try:
        before, after = json.loads(old), json.loads(new)
        if not isinstance(before, dict) or not isinstance(after, dict):
            return None
        return list(_differing("", _meant(before, root=True), _meant(after, root=True)))
    except (ValueError, RecursionError):
        return None


def summary(found: list[str]) -> str:
    """The first of them, and how many more there are."""
    rest = len(found) - MOST_SHOWN
    return ", ".join(found[:MOST_SHOWN]) + (f", and {rest} more" if rest > 0 else "")


def _meant(value: Any, *, root: bool = False) -> Any:
    if isinstance(value, list):
        return [_meant(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _meant(item) for key, item in value.items()}
    # a part with a model type is a configuration like the whole, as of a vision tower
    if root or "model_type" in found:
        version = str(found.get("transformers_version", ""))
        found = {key: item for key, item in found.items() if key not in _INFORMATION}
        if found.get("model_type") in _ASKED_FOR_VERSION:
            major = version.partition(".")[0]
            later = major.isdecimal() and int(major) >= 5
            found["transformers_version"] = (
                ("5 or later" if later else "below 5") if version else ""
            )
        other = found.pop("torch_dtype", None)
        if other is not None and found.get("dtype") is None:
            found["dtype"] = other
    return found


_ABSENT = object()


def _differing(path: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            inner = f"{path}.{key}" if path else key
            yield from _differing(inner, old.get(key, _ABSENT), new.get(key, _ABSENT))
        moved = old.keys() == new.keys() and list(old) != list(new)
        if moved and _ORDERED.intersection(path.split(".")):
            yield f"{path}: the keys have another order"
    elif not _equal(old, new):
        yield f"{path}: {_shown(old)} → {_shown(new)}"


def _equal(old: Any, new: Any) -> bool:
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_equal, old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_equal(old[key], new[key]) for key in old)
    return type(old) is type(new) and bool(old == new)


def _shown(value: Any) -> str:
    text = "absent" if value is _ABSENT else json.dumps(value)
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"
