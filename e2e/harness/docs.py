"""What the documents tell their readers to type: fenced blocks of commands, and commands within the
text.

A block in ``sh`` is a script; a block in ``console`` holds commands after ``$`` and what they
print. Both are run as they stand. A block that cannot be run has a comment in front of it that says
why: ``<!-- not run: needs a registry -->``. This module reads; it knows neither a cluster nor what
the commands mean.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = ("README.md", "docs/install.md", "docs/troubleshooting.md", "config/samples/README.md")
"""Documents about Kubernetes, whose blocks the tests run."""

PROGRAMS = ("kubectl", "helm", "make", "hotweights")
_FENCE = re.compile(r"^```(\w*)$")
_NOT_RUN = re.compile(r"^<!-- not run: (.+) -->$")
_INLINE = re.compile(r"`([^`\n]+)`")
_SEPARATORS = frozenset("();|&<>")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a document."""

    document: str
    line: int
    language: str
    text: str
    not_run: str  # why; empty: it is run

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def is_commands(self) -> bool:
        """Whether it is something to type."""
        return self.language in ("sh", "console") or self.text.startswith("$ ")

    @property
    def shown(self) -> list[tuple[str, str]]:
        """The commands of a console, each with what the document shows of its output."""
        parts = re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]
        return [
            (command, output.strip("\n"))
            for command, _, output in (part.partition("\n") for part in parts)
        ]

    @property
    def script(self) -> str:
        """What a shell is given."""
        if self.language == "sh":
            return self.text
        return "".join(f"{command}\n" for command, _ in self.shown)


def blocks(document: str) -> list[Block]:
    """The fenced blocks of a document, in their order."""
    found, reason = [], ""
    lines = iter(enumerate((ROOT / document).read_text().splitlines(), 1))
    for number, line in lines:
        if fence := _FENCE.match(line):
            inside = []
            for _, inner in lines:
                if inner == "```":
                    break
                inside.append(inner)
            found.append(Block(document, number, fence[1], "\n".join(inside) + "\n", reason))
        comment = _NOT_RUN.match(line)
        reason = comment[1] if comment else ""
    return found


def runnable() -> list[Block]:
    """All that is run."""
    return [
        block
        for document in RUN
        for block in blocks(document)
        if block.is_commands and not block.not_run
    ]


def not_run() -> list[Block]:
    """All that cannot be run, with the reasons."""
    return [
        block
        for document in RUN
        for block in blocks(document)
        if block.is_commands and block.not_run
    ]


def outline(text: str) -> list[str]:
    """What is the same whenever a command prints it: a table's columns, and else the names before
    colons that begin a line; names and ages of things differ.
    """
    first = next(iter(text.splitlines()), "").split()
    if first and all(word.isupper() for word in first):
        return first
    return re.findall(r"^([A-Z][\w ]*):", text, re.MULTILINE)


def inline(document: str) -> list[str]:
    """What stands between backticks in the text."""
    text = re.sub(
        r"^```.*?^```$", "", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL
    )
    return _INLINE.findall(text)


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a script, as words; those of pipes and substitutions too. Raises
    ValueError for an open quote.
    """
    line = ""
    for piece in text.replace("\\\n", " ").splitlines(keepends=True):
        line += piece
        try:
            tokens = _tokens(line)
        except ValueError:  # the quote goes on in the next line
            continue
        line = ""
        words: list[str] = []
        for token in (*tokens, ";"):
            if not set(token) <= _SEPARATORS:
                words.append(token)
            elif words:
                yield words
                words = []
    if line:
        raise ValueError(f"a quote is never closed: {line}")


def _tokens(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="".join(_SEPARATORS))
    lexer.whitespace_split = True
    return list(lexer)


def ours(document: str) -> Iterator[list[str]]:
    """Every command of a document that one of our readers' programs is to run."""
    scripts = [block.script for block in blocks(document) if block.is_commands]
    scripts += [
        block.text for block in blocks(document) if not block.language and _is_only_ours(block.text)
    ]
    scripts += [
        span for span in inline(document) if span.split()[0] in PROGRAMS and len(span.split()) > 1
    ]
    for script in scripts:
        yield from (words for words in commands(script) if words[0] in PROGRAMS)


def _is_only_ours(text: str) -> bool:
    return all(line.split()[0] in PROGRAMS for line in text.splitlines() if line.strip())
