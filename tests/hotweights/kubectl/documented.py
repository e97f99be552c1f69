"""What docs/kubectl.md shows: pictures and texts of the recorded scene, made by the plugin's own
views. ``python -m tests.hotweights.kubectl.documented`` writes them; a test holds them against it.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console

from hotweights.kubectl import doctor, history
from hotweights.kubectl.views import checks, picture, tree
from hotweights_operator.runtime import observe
from tests.hotweights.kubectl import scenes, test_views

ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "docs" / "kubectl.md"
PICTURE = ROOT / "docs" / "pictures" / "kubectl-get.svg"
WIDTH = 100  # characters


def svg() -> str:
    """The tree of a canary that waits, as a terminal draws it."""
    shot = scenes.snap(scenes.fleet(scenes.rollout(scenes.CANARY, scenes.WAITS)))
    console = Console(
        record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    for line in tree.lines(picture.pictures(shot), width=WIDTH):
        console.print(line, highlight=False)
    drawn = console.export_svg(title="kubectl hotweights get tiny", unique_id="tiny")
    # fonts that rich would have the reader's browser fetch from elsewhere: its own will do
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)


def outputs() -> dict[str, str]:
    """Command → what it prints."""
    ailing = test_views.calm()
    no = scenes.condition("Resolved", "False", "SourceNotFound", "no folder /models/v3 on node-0")
    (ailing["version"] or []).append(scenes.version("v3", {"conditions": [no]}))
    del (ailing["pod"] or [])[0]["spec"]["readinessGates"]
    found = checks.examine(test_views.facts(ailing))
    body = test_views.complete()
    body["status"] |= {
        "revision": 3,
        "phase": "Paused",
        "revisionStartedAt": "2026-11-22T12:12:00Z",
        "target": scenes.named("v3"),
    }
    waits = scenes.snap(scenes.fleet(scenes.rollout(scenes.CANARY, scenes.WAITS)))
    return {
        "kubectl hotweights get tiny": tree.plain(tree.lines(picture.pictures(waits))),
        "kubectl hotweights plan tiny --to v2": test_views.planned(
            test_views.calm(**scenes.CANARY)
        ).text(),
        "kubectl hotweights doctor": doctor.text(found),
        "kubectl hotweights history tiny": history.text(history.entries(observe.rollout(body))),
    }


def document() -> str:
    """The document, with the blocks that show these commands as they are now."""
    text = DOCUMENT.read_text()
    for command, output in outputs().items():
        pattern = rf"(```console\n\$ {re.escape(command)}\n).*?(```\n)"
        text, count = re.subn(
            pattern, lambda m, o=output: f"{m[1]}{o}{m[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise LookupError(f"docs/kubectl.md shows {command!r} {count} times")
    return text


if __name__ == "__main__":
    PICTURE.write_text(svg())
    DOCUMENT.write_text(document())
