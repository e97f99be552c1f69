"""Conditions on a result: ``result >= 0.99 && result <= 1.2``.

A condition compares ``result`` with literals and joins comparisons by ``&&`` and ``||``, of which
the first binds tighter. That is all, so that the custom resource's schema can refuse whatever is
none (`analysis.CONDITION_PATTERN`), and nothing is ever executed that somebody wrote.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Value = float | str | bool

_ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_COMPARISON = re.compile(
    r"result *(?P<sign><=|>=|==|!=|<|>) *"
    r'(?:(?P<number>-?[0-9]+(?:[.][0-9]+)?(?:[eE][-+]?[0-9]+)?)|(?P<word>true|false)|"(?P<text>[^"\\]*)")'
)
_SPACE = re.compile(r" *")
_JOIN = re.compile(r" *(&&|\|\|) *")


class NotACondition(ValueError):
    """A text that is no condition; it says where, and what would be one."""


class Incomparable(ValueError):
    """A result of another kind than what it is to be compared with."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """``result``, a sign and a literal."""

    sign: str
    literal: Value

    def holds(self, result: Value) -> bool:
        """Whether it is so. Raises `Incomparable`: true is not 1, and "1" is neither."""
        if _kind(result) != _kind(self.literal):
            raise Incomparable(
                f"the result is the {_kind(result)} {shown(result)}, and the condition compares it "
                f"with the {_kind(self.literal)} {shown(self.literal)}"
            )
        return _ORDERS[self.sign](result, self.literal)


@dataclass(frozen=True, slots=True)
class Expression:
    """Comparisons: one of these groups has to hold as a whole."""

    any_of: tuple[tuple[Comparison, ...], ...]

    def holds(self, result: Value) -> bool:
        """Whether the result satisfies it. Raises `Incomparable`, of any of its comparisons."""
        # each is asked: a mistake is to be found in the first measurement, not in some later one
        found = [[comparison.holds(result) for comparison in group] for group in self.any_of]
        return any(all(group) for group in found)


def parse(text: str) -> Expression:
    """A condition. Raises `NotACondition`."""
    groups: list[list[Comparison]] = [[]]
    place = _skipped(text, 0)
    while True:
        found = _COMPARISON.match(text, place)
        if found is None:
            raise NotACondition(
                f"{text!r}: at column {place + 1} there should be a comparison such as "
                "result < 0.05"
            )
        groups[-1].append(_comparison(found, text))
        place = found.end()
        join = _JOIN.match(text, place)
        if join is None:
            break
        if join[1] == "||":
            groups.append([])
        place = join.end()
    if _skipped(text, place) != len(text):
        raise NotACondition(f"{text!r}: at column {place + 1} there should be && or ||, or the end")
    return Expression(tuple(tuple(group) for group in groups))


def _comparison(found: re.Match[str], text: str) -> Comparison:
    if found["number"] is not None:
        return Comparison(found["sign"], float(found["number"]))
    if found["sign"] not in ("==", "!="):
        raise NotACondition(
            f"{text!r}: at column {found.start() + 1} {found['sign']} is for numbers; texts, true "
            "and false are compared by == and !="
        )
    if found["word"] is not None:
        return Comparison(found["sign"], found["word"] == "true")
    return Comparison(found["sign"], found["text"])


def _skipped(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place


def _kind(value: Value) -> str:
    # bool first: it is an int, too
    if isinstance(value, bool):
        return "truth value"
    return "text" if isinstance(value, str) else "number"


def shown(value: Value) -> str:
    """A value as it is written in a condition; numbers to nine digits."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else f"{value:.9g}"
