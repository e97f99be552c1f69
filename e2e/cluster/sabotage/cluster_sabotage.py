"""Makes a version bad on chosen pods. A general plugin of the tests' own, in a folder of its own on
``PYTHONPATH``: production code has no hook for it.

``HOTWEIGHTS_SABOTAGE`` names a file of JSON, ``{digest: {pod's name or "*": deed}}``, which the
tests change while engines run. It is read when a digest has been asked for; without the file, or
for any other digest, nothing happens. The deeds:

    mismatch   the switch happens, and then the probe runs into NaN: a commit that fails with a torn
    engine
    die        the engine's process is killed five seconds after it serves the version, at boot too
    hold       the switch waits for as long as the file says so, at most 45 s, and then does what
    the file says
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

SERVED_SECONDS = 5.0
HELD_SECONDS = 45.0  # less than a commit may take


def register() -> None:
    from vllm.v1.engine.core import EngineCore

    from hotweights.adapters.vllm import plugin

    plugin.register()  # theirs first, whatever the order of entry points is
    original = getattr(EngineCore, plugin.SWITCH_METHOD, None)
    if original is None or hasattr(original, "sabotaged"):
        return

    def switch(
        core: Any, digest: str | None, prompts: list[list[int]], lengths: list[int]
    ) -> dict[str, Any]:
        deadline = time.monotonic() + HELD_SECONDS
        while (deed := _deed(digest)) == "hold" and time.monotonic() < deadline:
            time.sleep(0.05)
        result: dict[str, Any] = original(core, digest, prompts, lengths)
        if deed == "mismatch":
            for answer in result["answers"]:
                answer["nan"] = True
        elif deed == "die":
            timer = threading.Timer(SERVED_SECONDS, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        return result

    switch.sabotaged = True  # type: ignore[attr-defined]
    setattr(EngineCore, plugin.SWITCH_METHOD, switch)


def _deed(digest: str | None) -> str:
    try:
        orders = json.loads(Path(os.environ["HOTWEIGHTS_SABOTAGE"]).read_text())
    except (KeyError, FileNotFoundError):
        return ""
    deeds: dict[str, str] = orders.get(digest, {})
    return deeds.get(socket.gethostname(), deeds.get("*", ""))
