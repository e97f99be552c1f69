"""What this host is known by where nobody says otherwise: its home folder, and what lies in it."""

from __future__ import annotations

import os
from pathlib import Path

HOME_VARIABLE = "HOTWEIGHTS_HOME"
ROOTS_VARIABLE = "HOTWEIGHTS_ROOTS"
"""Folders that plans may have this host read, with colons between them."""
CURRENT_MANIFEST = "current_manifest.json"
"""In the home folder: the manifest of what was committed last, which `hotweights plan` starts from.
"""


def home() -> Path:
    """Where this host keeps what it committed."""
    named = os.environ.get(HOME_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "hotweights"
