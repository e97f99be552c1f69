"""The small files beside the weights: a version may bring others than this engine booted with.

Weights alone are exchanged while an engine runs. With another ``rope_theta`` or ``sliding_window``,
another order of the vocabulary or another chat template it would go on with what it booted, and be
reported as serving the version: fluent, and wrong. So what a cold load reads is compared, byte by
byte, by the digests that the manifest has of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hotweights.adapters.vllm.rank.dry_load import DoesNotFit

_MODEL = frozenset(
    {
        "config.json", "generation_config.json", "preprocessor_config.json",
        "processor_config.json", "video_preprocessor_config.json",
    }
)  # fmt: skip
_TOKENIZER = frozenset(
    {
        "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json",
        "chat_template.json", "tekken.json",
    }
)  # fmt: skip
_TOKENIZER_SUFFIXES = (".jinja", ".model", ".tiktoken")
# transformers' own note of who wrote a file changes with every upgrade of a trainer, so a remedy
# for files that differ without meaning anything is part of the answer
_REMEDY = (
    "restart the pods with this version, or publish it without the file "
    "(hotweights publish --ignore {name}) if that does not matter"
)


class SideFiles:
    """What an engine booted with. Reads and hashes its folder once, at start-up."""

    def __init__(self, folder: Path, own_tokenizer: bool) -> None:
        """``own_tokenizer``: the tokenizer is this folder's, and no other was named."""
        self._own_tokenizer = own_tokenizer
        self._digests: dict[str, str] = {}
        if folder.is_dir():
            self._digests = {
                path.name: _digest(path)
                for path in sorted(folder.iterdir())
                if self._is_read(path.name) and path.is_file()
            }

    def check(self, files: Mapping[str, str]) -> DoesNotFit | None:
        """``files`` are a version's, name → BLAKE3 in hexadecimal digits. A file that the version
        lacks stays as it is; an engine whose folder is not known takes every version.
        """
        if not self._digests:
            return None
        for name, digest in files.items():
            if self._is_read(name) and digest != self._digests.get(name):
                how = (
                    "is not what this engine booted with"
                    if name in self._digests
                    else "was not there when this engine booted"
                )
                remedy = _REMEDY.format(name=name)
                return DoesNotFit(
                    "ConfigDiffers", f"{name} {how}, and only weights can be exchanged: {remedy}"
                )
        return None

    def _is_read(self, name: str) -> bool:
        return name in _MODEL or (
            self._own_tokenizer
            and (
                name in _TOKENIZER
                or name.startswith("tokenizer")
                or name.endswith(_TOKENIZER_SUFFIXES)
            )
        )


def _digest(path: Path) -> str:
    from blake3 import blake3  # every vLLM has it; the tests of this module need it not

    return str(blake3(path.read_bytes()).hexdigest())
