"""The last step before a daemon: note who this process is, join its cgroups, become the daemon.

It runs as a script (`python -I -S launch.py PARENT RECORD [CGROUP ...] -- PROGRAM ...`), and exec
keeps the process id and the start time. So the record of a daemon exists before the daemon does,
and no kill, however badly timed, can leave one that nobody has written down. It imports nothing of
this package, because it runs before every daemon and should take milliseconds.
"""

import json
import os
import sys
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def stat_fields(text: str) -> tuple[str, int]:
    """State letter and start time in clock ticks, from a /proc/PID/stat line.

    The program's name stands in parentheses and may itself hold spaces and parentheses.
    """
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


def main(arguments: list[str]) -> None:
    """Write the record, join the cgroups, exec."""
    divider = arguments.index("--")
    parent = int(arguments[0])
    record, *cgroups = (Path(word) for word in arguments[1:divider])
    program = arguments[divider + 1 :]
    for cgroup in cgroups:
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    identity = {
        "name": record.stem,
        "pid": os.getpid(),
        "started_ticks": stat_fields(Path("/proc/self/stat").read_text())[1],
        "boot": BOOT_ID.read_text().strip(),
        "argv": program,
    }
    temporary = record.with_suffix(".new")
    temporary.write_text(json.dumps(identity))
    temporary.replace(record)
    if os.getppid() != parent:
        sys.exit("Whoever wanted this daemon has died meanwhile; so it does not start.")
    os.execvp(program[0], program)


if __name__ == "__main__":
    main(sys.argv[1:])
