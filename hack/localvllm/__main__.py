"""`python -m localvllm ensure` builds vLLM and prints its folder; `python -m localvllm models DIR`
writes tiny models.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from localvllm import build, models


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m localvllm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ensure = commands.add_parser(
        "ensure", help="build vLLM for CPUs if it is not there, and print its folder"
    )
    ensure.add_argument(
        "--uncompiled",
        action="store_true",
        help="leave it to Python to compile what is imported: faster, for a single start",
    )
    make = commands.add_parser("models", help="write tiny checkpoints into DIR/<arch>-<seed>")
    make.add_argument("dir", type=Path)
    make.add_argument(
        "--arch", choices=models.ARCHITECTURES, action="append", help="default: all of them"
    )
    make.add_argument("--seeds", type=int, default=2, help="how many versions of each (default: 2)")
    make.add_argument("--shards", type=int, default=1)
    make.add_argument("--dtype", choices=models.DTYPES, default="float32")
    arguments = parser.parse_args()
    try:
        if arguments.command == "ensure":
            print(build.ensure(compiled=not arguments.uncompiled))
        else:
            wanted = [
                models.Model(
                    arguments.dir / f"{arch}-{seed}", arch, seed, arguments.shards, arguments.dtype
                )
                for arch in arguments.arch or models.ARCHITECTURES
                for seed in range(arguments.seeds)
            ]
            models.make_models(wanted)
            print(*(model.dir for model in wanted), sep="\n")
    except build.BuildError as error:
        print(f"localvllm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
