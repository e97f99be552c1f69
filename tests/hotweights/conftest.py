"""The command line as a user calls it, without the time that a process takes to start."""

from __future__ import annotations

import sys

import pytest

from hotweights import cli
from tests.hotweights.command_line import Done, Run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process."""
    monkeypatch.setenv("COLUMNS", "500")

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["hotweights", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 0
        return Done(code, *capfd.readouterr())

    return call
