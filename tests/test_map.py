"""The map for newcomers, docs/design/000-map.md: what it names is there, and no room of the product
is missing from it.
"""

from __future__ import annotations

import re

import pytest

from tests.product import FOLDERS, ROOT

PAGE = (ROOT / "docs" / "design" / "000-map.md").read_text()
TOPS = {path.name for path in ROOT.iterdir() if path.is_dir()}
NAMED = sorted(
    {
        span
        for span in re.findall(r"`([\w.-]+(?:/[\w.-]+)+)`", PAGE)
        if span.partition("/")[0] in TOPS
    }
)


def rows_of(heading: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    _, _, rest = PAGE.partition(f"\n## {heading}")
    section, _, _ = rest.partition("\n## ")
    rows = re.findall(r"^\| (.*) \|$", section, re.MULTILINE)
    return [row.split(" | ") for row in rows[1:]]


@pytest.mark.parametrize("name", NAMED)
def test_what_it_names_is_there(name: str) -> None:
    assert (ROOT / name).exists()


def test_it_names_enough() -> None:
    assert len(NAMED) >= 150, "most of the product's modules that a newcomer meets have a path"


DEFINED = sorted(
    {
        (path, name)
        for path, names in re.findall(r"`([\w./-]+\.py)` \(((?:`\w+`(?:, )?)+)", PAGE)
        for name in re.findall(r"`(\w+)`", names)
    }
)


@pytest.mark.parametrize(("path", "name"), DEFINED)
def test_what_it_finds_in_a_module_is_defined_there(path: str, name: str) -> None:
    text = (ROOT / path).read_text()
    assert re.search(rf"^\s*(class|def|async def) {name}\b|^\s*{name}( =|:)", text, re.MULTILINE)


def test_it_says_of_some_modules_what_to_look_for() -> None:
    assert len(DEFINED) > 10


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([\w./-]+)\)", PAGE))))
def test_its_links_lead_somewhere(link: str) -> None:
    assert (ROOT / "docs" / "design" / link).exists()


def test_every_task_has_a_file_and_a_test() -> None:
    rows = rows_of("What do I change for")
    assert len(rows) >= 25
    for task, files, tests in rows:
        assert re.search(r"`[\w.-]+/", files), f"{task}: which file?"
        assert re.search(r"`(tests|e2e)/[\w./-]+`", tests), f"{task}: which test?"


def test_every_room_of_the_product_is_on_it() -> None:
    rooms = {
        str(path.parent.relative_to(ROOT)) for top in FOLDERS for path in (ROOT / top).rglob("*.py")
    }
    assert len(rooms) > 35
    assert [room for room in sorted(rooms) if f"`{room}`" not in PAGE] == []
