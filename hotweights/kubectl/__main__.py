"""The plugin as a process: ``kubectl-hotweights``, which kubectl runs for ``kubectl hotweights``.

How any command fails is here: one line that names the thing and the remedy, or one JSON object, and
an exit code of `options.Exit`. What takes long to import is imported where Ctrl-C is caught already.
"""

from __future__ import annotations

import json
import sys
from typing import Any

INTERRUPTED = 130
PROGRAM = "kubectl hotweights"


def main() -> None:
    """Entry point of the script ``kubectl-hotweights``."""
    try:
        _run()
    except KeyboardInterrupt:
        _fail("Interrupted", "interrupted; nothing was done", INTERRUPTED)


def _run() -> None:
    """Whatever was typed. Raises `SystemExit`; KeyboardInterrupt for a Ctrl-C of which no command
    told.
    """
    import typer

    from hotweights.kubectl.app import app
    from hotweights.kubectl.options import Exit, Failed
    from hotweights_common.errors import HotweightsError
    from hotweights_common.reasons import Reason

    try:
        if not _is_for_machines():
            _draw(app)
        code = typer.main.get_command(app).main(prog_name=PROGRAM, standalone_mode=False)
    except typer.TyperException as error:
        _fail(Reason.WRONG_USAGE, error.format_message(), Exit.USAGE)
    except Failed as error:
        _fail(error.reason, str(error), error.code)
    except HotweightsError as error:
        _fail(error.reason, str(error), Exit.NOT_ASKED)
    sys.exit(code)


def _draw(app: Any) -> None:
    """For people typer draws wrong usage, with the usage beside it."""
    try:
        app(prog_name=PROGRAM)
    except SystemExit as left:
        if left.code == INTERRUPTED:  # typer takes Ctrl-C for itself, and says nothing
            raise KeyboardInterrupt from None
        raise


def _is_for_machines() -> bool:
    # not typer's: what failed may have failed before any option was read
    pairs = zip(sys.argv, sys.argv[1:], strict=False)
    words = ("--json", "-ojson", "--output=json")
    return any(word in sys.argv for word in words) or any(
        flag in ("-o", "--output") and value == "json" for flag, value in pairs
    )


def _fail(reason: str, message: str, code: int) -> None:
    """Say why, and end the process."""
    if _is_for_machines():
        print(json.dumps({"error": {"reason": reason, "message": message}}))
    else:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
