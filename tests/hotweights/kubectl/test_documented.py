"""The document of the plugin shows what the plugin prints."""

from __future__ import annotations

import re

from hotweights.kubectl.app import app
from hotweights.kubectl.options import Exit
from tests.hotweights.kubectl import documented

REMEDY = "run `python -m tests.hotweights.kubectl.documented`"


def test_the_picture_is_what_the_plugin_draws() -> None:
    assert documented.PICTURE.read_text() == documented.svg(), REMEDY


def test_what_the_document_shows_is_what_the_plugin_prints() -> None:
    assert documented.DOCUMENT.read_text() == documented.document(), REMEDY


def test_every_command_and_every_exit_code_is_described() -> None:
    text = documented.DOCUMENT.read_text()
    names = {command.name for command in app.registered_commands}
    assert {name for name in names if f"`{name}" not in text} == set()
    codes = set(map(int, re.findall(r"^\| (\d+) \|", text, re.MULTILINE)))
    assert codes == set(map(int, Exit))
