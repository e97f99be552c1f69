"""What people ask of a rollout beside its spec: the annotation ``hotweights.dev/command``, read.

A command names the revision that its author saw, so that one which comes late harms no other. It
stands in an annotation and what came of it in the status: nothing of it is in the spec, which
belongs to Git. What a command does is decided in ``decide/commands.py``; this knows the text alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

Verb = Literal[
    "pause",
    "resume",
    "promote",
    "promote-full",
    "abort",
    "retry",
    "restart-failed",
    "rollback",
]

GRAMMAR = (
    "write VERB REVISION [ID]: a verb of pause, resume, promote, promote-full, abort, retry, "
    "restart-failed, rollback or rollback@VERSION; status.revision as you see it; and any other "
    "word to say the same once more"
)

_FORM = re.compile(
    r"(?P<verb>[a-z-]+)(@(?P<argument>[A-Za-z0-9._-]{1,253}))? +(?P<revision>[0-9]{1,18})( +[!-~]+)?"
)


@dataclass(frozen=True, slots=True)
class Command:
    """One command, as it was meant."""

    text: str  # as it was written: the same text is one command
    verb: Verb
    argument: str  # what stands behind the @; empty: nothing
    revision: int


class NotACommand(ValueError):
    """A text that asks for nothing; it says what to write instead."""


def parse(text: str) -> Command:
    """The command of an annotation's text. Raises `NotACommand`."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise NotACommand(f"{text[:64]!r} is no command: {GRAMMAR}")
    verb, argument = found["verb"], found["argument"] or ""
    if verb not in get_args(Verb):
        raise NotACommand(f"{verb[:32]!r} is no verb: {GRAMMAR}")
    if argument and verb != "rollback":
        raise NotACommand(f"{verb} takes no @{argument[:64]}: {GRAMMAR}")
    return Command(text, cast("Verb", verb), argument, int(found["revision"]))
