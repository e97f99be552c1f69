"""No block of the documents is left out: each is run by a test that takes it by these words."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
TESTS = sorted(path for path in FOLDER.glob("test_*.py") if path.name != Path(__file__).name)


def taken(path: Path) -> Iterator[tuple[str, str]]:
    """The words by which the tests of a module take their blocks."""
    module = ast.parse(path.read_text())
    known = {
        target.id: node.value
        for node in module.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def said(word: ast.expr) -> str:
        if isinstance(word, ast.BinOp):
            return said(word.left) + said(word.right)
        return str(ast.literal_eval(known[word.id] if isinstance(word, ast.Name) else word))

    for node in ast.walk(module):
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if is_call and node.func.id == "block":  # type: ignore[attr-defined]
            heading, word = node.args  # type: ignore[attr-defined]
            yield said(heading), said(word)


def test_every_block_has_a_test(every_block: list[Any], block: Callable[[str, str], str]) -> None:
    found = {block(*words) for path in TESTS for words in taken(path)}
    assert {one.document for one in every_block} == {"deployment.md", "vllm_integration.md"}
    fences = (FOLDER / "deployment.md").read_text().count("```")
    assert sum(one.document == "deployment.md" for one in every_block) == fences // 2 > 0
    left = [(one.heading, one.text) for one in every_block if one.text not in found]
    assert left == [], "nobody runs these"


def test_the_table_names_every_test() -> None:
    table = (FOLDER.parents[1] / "docs" / "SEEDS.md").read_text()
    assert TESTS
    for path in TESTS:
        names = re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE)
        assert names
        for name in names:
            assert re.search(rf"\b{name}\b", table), f"docs/SEEDS.md does not name {name}"
