"""The small files beside the weights: a version may bring others than this engine booted with.

Weights alone are exchanged while an engine runs. With another ``rope_theta`` or ``sliding_window``,
another order of the vocabulary or another chat template it would go on with what it booted, and be
reported as serving the version: fluent, and wrong. So what a cold load reads is compared, byte by
byte, by the digests that the manifest has of it; and ``config.json``, which every newer trainer
spells a little differently, by what it means, where the agent brought its text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from hotweights.adapters.vllm.rank.fit import config_meaning
from hotweights.adapters.vllm.rank.fit.dry_load import DoesNotFit

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
_CONFIG = "config.json"
# also for a file that differs without meaning anything, which only whoever wrote it can know
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
        self._config = ""  # its text; empty: there is none, or it is too large to be understood
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                if self._is_read(path.name) and path.is_file():
                    content = path.read_bytes()
                    self._digests[path.name] = _digest(content)
                    if path.name == _CONFIG and len(content) <= config_meaning.MAX_NBYTES:
                        with contextlib.suppress(UnicodeDecodeError):  # compared by its digest
                            self._config = content.decode()

    def check(
        self, files: Mapping[str, str], texts: Mapping[str, str] | None = None
    ) -> DoesNotFit | None:
        """``files`` are a version's, name → BLAKE3 in hexadecimal digits, and ``texts`` what is in
        them, where that is known. A file that the version lacks stays as it is; an engine whose
        folder is not known takes every version.
        """
        if not self._digests:
            return None
        for name, digest in files.items():
            if self._is_read(name) and digest != self._digests.get(name):
                found = self._config_differs(digest, (texts or {}).get(name, ""))
                if name == _CONFIG and found == []:
                    continue
                how = (
                    "is not what this engine booted with"
                    if name in self._digests
                    else "was not there when this engine booted"
                )
                if name == _CONFIG and found:
                    how += f" ({config_meaning.summary(found)})"
                remedy = _REMEDY.format(name=name)
                return DoesNotFit(
                    "ConfigDiffers", f"{name} {how}, and only weights can be exchanged: {remedy}"
                )
        return None

    def _config_differs(self, digest: str, text: str) -> list[str] | None:
        """What means something else in a version's configuration; None: it cannot be said."""
        if not self._config or not text or len(text) > config_meaning.MAX_NBYTES:
            return None
        if _digest(text.encode()) != digest:  # of another file: then it proves nothing
            return None
        return config_meaning.differences(self._config, text)

    def _is_read(self, name: str) -> bool:
        return name in _MODEL or (
            self._own_tokenizer
            and (
                name in _TOKENIZER
                or name.startswith("tokenizer")
                or name.endswith(_TOKENIZER_SUFFIXES)
            )
        )


def _digest(content: bytes) -> str:
    from blake3 import blake3  # every vLLM has it; the tests of this module need it not

    return str(blake3(content).hexdigest())
