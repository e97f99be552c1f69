"""``python -m hotweights_agent``: runs the agent of one node until SIGTERM or SIGINT.

Exit codes: 0 after a signal, 2 when the settings are unusable, 1 when a part could not be started
or broke.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path

from hotweights_agent import settings
from hotweights_agent.engines.socket_server import ServerNotStarted
from hotweights_agent.local import plugin_folder
from hotweights_agent.local.plugin_folder import PluginNotInstalled
from hotweights_agent.settings import Settings, SettingsError
from hotweights_kube.errors import NotConfigured

log = logging.getLogger("hotweights_agent")


def version() -> str:
    """The installed version of Hotweights; ``0+unknown`` in a tree that is not installed."""
    try:
        return version_of("hotweights")
    except PackageNotFoundError:
        return "0+unknown"


def main() -> int:
    """The command. Gives the exit code, as it is told above."""
    parser = argparse.ArgumentParser(
        prog="python -m hotweights_agent", description="The Hotweights agent of one node."
    )
    parser.add_argument("--version", action="version", version=version())
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"settings in YAML or JSON (default: ${settings.CONFIG_VARIABLE})",
    )
    parser.add_argument(
        "--check", action="store_true", help="print the settings and end; 2 when they are unusable"
    )
    parser.epilog = "Environment: " + ", ".join(
        [*settings.FROM_ENVIRONMENT, settings.CONFIG_VARIABLE]
    )
    arguments = parser.parse_args()
    try:
        found = settings.read(os.environ, arguments.config)
    except SettingsError as error:
        print(f"hotweights-agent: {error}", file=sys.stderr)
        return 2
    if arguments.check:
        print(found)
        return 0
    logging.basicConfig(
        level=found.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    return asyncio.run(_run(found))


async def _run(found: Settings) -> int:
    from hotweights_agent import agent  # takes a while; --help should not

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    _keep_plugins(found)
    try:
        await agent.run(found, version(), stop)
    except (ServerNotStarted, PluginNotInstalled, NotConfigured, OSError) as error:
        log.error("the agent cannot run: %s", error)
        return 1
    log.info("the agent ends; engines go on serving")
    return 0


def _keep_plugins(found: Settings) -> None:
    """A pod may name the plugin of an agent before this one, and a reboot has emptied the run
    folder.
    """
    try:
        again = plugin_folder.keep(
            found.plugin_folder, found.state_folder / "plugin", found.run_folder, version()
        )
    except PluginNotInstalled as error:
        log.warning(
            "%s; pods that started with them cannot restart their containers after a reboot", error
        )
    else:
        if again:
            log.info("earlier versions of the plugin are laid out again: %s", ", ".join(again))


if __name__ == "__main__":
    sys.exit(main())
