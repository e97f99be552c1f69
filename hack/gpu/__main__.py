"""`python -m gpu pack DIR`; see the package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gpu import pack

parser = argparse.ArgumentParser(prog="python -m gpu", description=pack.__doc__)
parser.add_argument("command", choices=["pack"])
parser.add_argument("destination", type=Path, metavar="DIR")
arguments = parser.parse_args()
nbytes = pack.pack(arguments.destination)
print(f"{arguments.destination}: {nbytes / 2**20:.1f} MiB; there: make gpu BUNDLE=…")
sys.exit(0)
