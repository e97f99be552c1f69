"""Nothing that others rely on changes unseen."""

import pytest

from tests.surface import surface


@pytest.mark.timeout(200)  # it starts the programs
def test_what_is_promised_outside_is_what_is_written_down() -> None:
    found, written = surface.public().splitlines(), surface.FILE.read_text().splitlines()
    assert len(written) > 200
    new = [line for line in found if line not in written]
    gone = [line for line in written if line not in found]
    remedy = "if it is meant, run `python -m tests.surface.surface`, and say so in CHANGELOG.md"
    assert (new, gone) == ([], []), remedy
