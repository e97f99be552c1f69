"""The plugin's command line: which commands there are, and how any of them fails.

kubectl runs whatever is called ``kubectl-hotweights`` in the PATH for ``kubectl hotweights``. Exit
codes are those of `options.Exit`, for every command.
"""

from __future__ import annotations

import json
import sys

import typer

from hotweights.kubectl import (
    completion,
    doctor,
    get,
    history,
    options,
    plan,
    status,
    steer,
)
from hotweights_common.errors import HotweightsError
from hotweights_common.reasons import Reason

app = typer.Typer(
    help="Look at weight rollouts, wait for them, and steer them.",
    no_args_is_help=True,
    add_completion=False,  # kubectl has a convention of its own (`completion`)
    pretty_exceptions_enable=False,
)
app.command("get")(get.get)
app.command("status")(status.status)
app.command("plan")(plan.plan)
app.command("promote")(steer.promote)
app.command("rollback")(steer.rollback)
for verb in steer.PLAIN:
    app.command(verb)(steer.plain(verb))
app.command("history")(history.history)
app.command("doctor")(doctor.doctor)
app.command("completion")(completion.completion)


@app.callback()
def kubectl_hotweights() -> None:
    """Look at weight rollouts, wait for them, and steer them."""


def main() -> None:
    """Entry point of the script ``kubectl-hotweights``."""
    try:
        code = typer.main.get_command(app).main(
            prog_name="kubectl hotweights", standalone_mode=False
        )
    except typer.TyperException as error:
        if not _is_for_machines():
            error.show()
            sys.exit(options.Exit.USAGE)
        _fail(Reason.WRONG_USAGE, error.format_message(), options.Exit.USAGE)
    except options.Failed as error:
        _fail(error.reason, str(error), error.code)
    except HotweightsError as error:
        _fail(error.reason, str(error), options.Exit.NOT_SO)
    except (KeyboardInterrupt, typer.Abort):
        _fail(Reason.INTERRUPTED, "interrupted; nothing was done", options.Exit.INTERRUPTED)
    except BrokenPipeError:
        # whoever read us has seen enough; what is left in the buffer has nowhere to go
        sys.stderr.close()
        sys.exit(options.Exit.DONE)
    sys.exit(code)


def _is_for_machines() -> bool:
    # not typer's: what failed may have failed before any option was read
    return "--json" in sys.argv or "-ojson" in sys.argv or _follows("-o", "--output")


def _follows(*flags: str) -> bool:
    pairs = zip(sys.argv, sys.argv[1:], strict=False)
    return any(flag in flags and value == "json" for flag, value in pairs)


def _fail(reason: str, message: str, code: int) -> None:
    if _is_for_machines():
        print(json.dumps({"error": {"reason": reason, "message": message}}))
    else:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
