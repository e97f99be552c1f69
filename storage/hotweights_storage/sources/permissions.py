"""Who may read a file, and what to say where somebody may not.

Trainers seldom run as root, and safetensors writes files of mode 0600 since 0.8. Agents are root
without capabilities: they read as the owner, the group or anybody does, never past the mode (the chart's ``agent.capabilities`` can
change that).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping


def refusal(status: os.stat_result | None) -> str:
    """Why this process may not read a file or folder, and the remedy; None: not even its mode is
    known.
    """
    me = f"this process is user {os.geteuid()}, group {os.getegid()}"
    if status is None:
        return f"Permission denied, and its mode cannot be seen ({me}); {_remedy('rX')}"
    what = "rX" if stat.S_ISDIR(status.st_mode) else "r"
    return f"Permission denied: it {_described(status)}, and {me}; {_remedy(what)}"


def hidden_from_agents(statuses: Mapping[str, os.stat_result]) -> str:
    """A sentence about the files or folders that agents cannot read, the first by name; empty:
    they can read all.
    """
    hidden = [name for name, status in statuses.items() if not _agents_read(status)]
    if not hidden:
        return ""
    more = f" (and {len(hidden) - 1} more)" if len(hidden) > 1 else ""
    text = f"{hidden[0]}{more} {_described(statuses[hidden[0]])}"
    return f"{text}: agents, which are root without capabilities, cannot read it; {_remedy('rX')}"


def _agents_read(status: os.stat_result) -> bool:
    # the first class that fits decides alone: an owner without the bit is not asked as a group
    shift = 6 if status.st_uid == 0 else 3 if status.st_gid == 0 else 0
    wanted = 0o5 if stat.S_ISDIR(status.st_mode) else 0o4
    return status.st_mode >> shift & wanted == wanted


def _described(status: os.stat_result) -> str:
    mode = stat.S_IMODE(status.st_mode)
    return f"has mode {mode:04o} and belongs to user {status.st_uid}, group {status.st_gid}"


def _remedy(what: str) -> str:
    return (
        f"let everybody read it: chmod -R a+{what}, as the last step of a save; or set "
        "agent.capabilities of the chart"
    )
