"""The plugin's command line: which commands there are. How any of them fails, ``__main__`` says."""

from __future__ import annotations

import typer

from hotweights.kubectl import (
    completion,
    doctor,
    get,
    history,
    plan,
    status,
    steer,
)

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
