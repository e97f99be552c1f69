"""No block of the documents is left out: each is run by a test that takes it by these words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def test_every_block_has_a_test(every_block: list[Any]) -> None:
    tests = "".join(
        path.read_text()
        for path in sorted(FOLDER.glob("test_*.py"))
        if path.name != Path(__file__).name
    )
    taken = re.findall(r'block\("([^"]+)",', tests)
    for one in every_block:
        assert any(heading in one.heading for heading in taken), (
            f"nobody runs what stands under {one.heading!r}"
        )


def test_the_table_names_every_test() -> None:
    table = (FOLDER.parents[1] / "docs" / "SEEDS.md").read_text()
    for path in sorted(FOLDER.glob("test_*.py")):
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE):
            assert name in table or path.name == Path(__file__).name, (
                f"docs/SEEDS.md does not name {name}"
            )
