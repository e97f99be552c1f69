"""Nothing that others rely on changes unseen."""

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from hotweights.cli import app
from hotweights.kubectl.app import app as plugin
from tests.surface import surface


@pytest.mark.timeout(200)  # it starts the programs
def test_what_is_promised_outside_is_what_is_written_down() -> None:
    found, written = surface.public().splitlines(), surface.FILE.read_text().splitlines()
    assert len(written) > 200
    new = [line for line in found if line not in written]
    gone = [line for line in written if line not in found]
    remedy = "if it is meant, run `python -m tests.surface.surface`, and say so in CHANGELOG.md"
    assert (new, gone) == ([], []), remedy


def leaves(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The commands that do something, by what is typed."""
    children = getattr(command, "commands", {})
    if not children:
        yield path, command
    for name, child in children.items():
        yield from leaves(child, f"{path} {name}")


def test_every_command_takes_json() -> None:
    lacking = [
        path
        for program, name in ((app, "hotweights"), (plugin, "kubectl hotweights"))
        for path, command in leaves(typer.main.get_command(program), name)
        if not any("--json" in parameter.opts for parameter in command.params)
    ]
    assert lacking == []
