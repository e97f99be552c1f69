"""Every reason that the product gives is in the one list; so are those of the plugin, which cannot
import it, and those that the documents explain.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from hotweights_common.reasons import (
    COUNTED_BY_AGENTS,
    POD_IS_AWAY,
    SHOWN_BY_VERSIONS,
    TRANSIENT_FOR_ENGINES,
    Reason,
)
from hotweights_crds.weightrollout import WeightRolloutStatus
from tests.product import FOLDERS, ROOT

GIVE = re.compile(
    r"(Error|Refused|Rejection|Missing|Failed|Unavailable|DoesNotFit|_refuse|refuse)$"
)
WORD = re.compile(r"[A-Z][a-z]+([A-Z][A-Za-z]*)?")
PHASES = {"Serving", "Staging", "Preparing", "Committing", "Booting", "Prepared", "Staged", "Dirty"}
CONDITIONS = {
    "Following",
    "Resolved",
    "Resolving",
    "Paused",
    "Stalled",
    "Reconciling",
    "Complete",
    "Pending",
}


def given() -> Iterator[tuple[str, str]]:
    """Place and word, where a reason is spelled: a class's, a keyword's, an error's argument."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "/sim/" in str(path):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                words: list[ast.expr] = []
                match node:
                    case ast.Assign(targets=[ast.Name(id="reason")], value=value):
                        words = [value]
                    case ast.keyword(arg="reason", value=value):
                        words = [value]
                    case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=args) if (
                        GIVE.search(name)
                    ):
                        words = args
                for word in words:
                    if isinstance(word, ast.Constant) and WORD.fullmatch(str(word.value)):
                        yield str(path.relative_to(ROOT)), str(word.value)


def test_a_reason_that_is_given_is_in_the_list() -> None:
    found = list(given())
    assert len(found) > 15  # the others cannot be spelled wrong: they are `Reason.…`
    known = set(Reason) | PHASES | CONDITIONS
    assert [(place, word) for place, word in found if word not in known] == []


def test_a_reason_that_is_explained_is_in_the_list() -> None:
    rows = (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
    names = [row.split("|")[1] for row in rows if row.startswith("| `")]
    words = {word for name in names for word in re.findall(r"`([A-Z][A-Za-z]+)`", name)}
    assert len(words) > 40
    conditions = {"VersionResolved", *WeightRolloutStatus.model_fields}
    assert words - set(Reason) - PHASES - CONDITIONS - conditions - {"NotFound"} == set()


def test_a_reason_that_a_pod_or_a_version_may_show_is_explained() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    shown = COUNTED_BY_AGENTS | POD_IS_AWAY | TRANSIENT_FOR_ENGINES | SHOWN_BY_VERSIONS
    assert len(shown) > 40
    assert [reason for reason in sorted(shown) if f"`{reason}`" not in text] == []


def test_a_reason_is_one_word_that_conditions_take() -> None:
    assert len(Reason) > 100
    assert [
        reason for reason in Reason if not re.fullmatch(r"[A-Z][A-Za-z0-9]{0,63}", reason)
    ] == []
