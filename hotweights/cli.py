"""The command line: which commands there are, and how any of them fails.

Commands live in ``hotweights.commands``; they raise, and this module turns what they raise into one
line that names the thing and the remedy. Exit codes: 0 done, 1 refused or failed, 2 wrong usage,
130 interrupted.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from hotweights.commands import (
    bench,
    coordinator,
    manifest,
    plan,
    prune_versions,
    publish,
    ranks,
    replicate,
    verify_plan,
    worker,
)
from hotweights.commands.options import Interrupted
from hotweights_common.errors import HotweightsError
from hotweights_common.reasons import Reason
from hotweights_storage import linux

app = typer.Typer(
    help="Put new weights into running vLLM pods.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("publish")(publish.publish)
app.command("prune-versions")(prune_versions.prune_versions)
app.command("plan")(plan.plan)
app.command("verify-plan")(verify_plan.verify_plan)
app.command("tp-groups")(ranks.tp_groups)
app.command("verify-tp")(ranks.verify_tp)
app.command("bucket-suggest")(ranks.bucket_suggest)
app.add_typer(manifest.app, name="manifest")
coordinator.register(app)
app.command("replicate")(replicate.replicate)
app.command("worker")(worker.worker)
app.command("bench")(bench.bench)

INTERRUPTED_CODE = 130
INTERRUPTED = (Reason.INTERRUPTED, "interrupted; nothing was written", INTERRUPTED_CODE)


def _show_version(asked: bool) -> None:
    if asked:
        from hotweights_agent.__main__ import version

        print(f"hotweights {version()}")
        raise typer.Exit


@app.callback()
def hotweights(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Say which release this is."
        ),
    ] = False,
) -> None:
    """Put new weights into running vLLM pods: publish a checkpoint as a version, check one, follow
    a rollout.
    """


def main() -> None:
    """Entry point of the script ``hotweights``."""
    # a version that is replicated is a file for each GiB, and a coordinator has one for each client
    linux.raise_descriptor_limit()
    try:
        _run()
    except Interrupted as error:
        _fail(error.reason, str(error), INTERRUPTED_CODE)
    except HotweightsError as error:
        _fail(error.reason, str(error), 1)
    except OSError as error:
        _fail("OSError", f"{error.filename or 'input or output'}: {error.strerror}", 1)
    except KeyboardInterrupt:
        _fail(*INTERRUPTED)
    except SystemExit as left:
        if left.code == INTERRUPTED_CODE:  # typer takes Ctrl-C for itself, and says nothing
            _fail(*INTERRUPTED)
        raise


def _run() -> None:
    """Whatever was typed. For people typer draws wrong usage itself, with the usage beside it."""
    if not _is_for_machines():
        app()
        return
    try:
        code = typer.main.get_command(app).main(standalone_mode=False)
    except typer.TyperException as error:
        _fail(Reason.WRONG_USAGE, error.format_message(), error.exit_code)
    sys.exit(code)


def _is_for_machines() -> bool:
    # not typer's: what failed may have failed before any option was read
    return "--json" in sys.argv


def _fail(reason: str, message: str, code: int) -> None:
    if _is_for_machines():
        print(json.dumps({"error": {"reason": reason, "message": message}}))
    else:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
