"""`docs/WALKTHROUGHS.md`, each from its first line to its last; what needs a GPU falls back and
says so.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(1200)  # the first one installs everything


def walkthrough(number: int) -> str:
    text = (Path(__file__).parents[2] / "docs" / "WALKTHROUGHS.md").read_text()
    return str(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)[number - 1])


def test_one_host(house: Any) -> None:
    printed = house.run(walkthrough(1))
    assert re.search(r"gds|pinned|no GPU", printed)
    assert list((house.folder / "home/.cache/hotweights/current").glob("*.safetensors"))


def test_two_ranks(house: Any) -> None:
    assert house.run(walkthrough(2)).count("images equal: True") == 2


def test_coordinators_and_workers(house: Any) -> None:
    house.run(walkthrough(3))
    both = "HOTWEIGHTS_COORD=tcp://127.0.0.1:5555,tcp://127.0.0.1:5565"
    status = json.loads(house.run(f"{both} hotweights coord-status --timeout 60 --json"))
    assert (status["state"], status["version"]) == ("committed", "v1")
    assert set(status["precommitted"]) == {"first", "second"}
