"""docs/reliability.md names tests: each of them exists, and every finding has one or says that it
is open.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text()
NAMED = re.findall(r"`((?:tests|e2e|bench)/[\w/]+\.py)(?:::(\w+))?`", PAGE)


def test_every_test_that_is_named_exists() -> None:
    for path, name in NAMED:
        source = ROOT / path
        assert source.exists(), path
        if name:
            tree = ast.parse(source.read_text())
            names = {node.name for node in ast.walk(tree) if hasattr(node, "name")}
            names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            assert name in names, f"{path} has no {name}"
    assert len(NAMED) > 40


def test_every_finding_is_shown_or_open() -> None:
    findings, _, _ = PAGE.partition("## Whole rollouts in memory")
    rows = [
        line
        for line in findings.splitlines()
        if line.startswith("| ") and "what was wrong" not in line
    ]
    assert len(rows) >= 36
    assert {f"F{n}" for n in range(1, 21)} <= {row.split("|")[1].strip() for row in rows}
    for row in rows:
        assert "**open**" in row or re.search(r"`(tests|e2e|bench)/", row), row
