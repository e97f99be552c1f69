"""How fast a plan's version comes into memory here: ``hotweights bench`` as a program, for machines
with and without a GPU.

    python bench/bench_replicate.py plan.json [--repeat 3] [--pinned] [--device cpu|cuda] [--cold]
    [--json]

The plan's source is read below the current folder, or below what ``--root`` names.
"""

from __future__ import annotations

import sys

from hotweights.cli import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    for at, argument in enumerate(arguments):
        if argument.endswith(".json") and arguments[at - 1 : at] != ["--plan"]:
            arguments.insert(at, "--plan")
            break
    sys.argv[1:] = ["bench", *arguments]
    main()
