"""How soon another coordinator takes over when the leader is killed, and whether anything is lost
or made up meanwhile.

Three coordinators on a Redis of their own (append-only file, synced before every answer), workers
and operators that never rest. The leader is killed with SIGKILL in the middle of updates, again and
again; now and then Redis is restarted or hangs, or the leader is frozen for longer than its lease.
Two figures for each kill: until another says that it leads, which may take one and a half leases,
and until a worker is answered, which includes that its client notices. What everybody was told is
compared with what Redis wrote.

    python bench/coordinator_ha.py [--kills 20] [--lease 1.0] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from tests.coordinator.ha.storm import Report, storm

ALLOWED_LEASES = 1.5


async def measure(kills: int, lease_seconds: float, folder: Path) -> Report:
    """A storm of so many kills."""
    async with storm(folder, lease_seconds) as running:
        await running.run(kills)
    return running.report


def figures(report: Report, seconds: float) -> dict[str, Any]:
    """The report with what follows from it."""
    leads = [one.leads_seconds for one in report.take_overs]
    serves = [one.serves_seconds for one in report.take_overs]
    within = sum(one <= ALLOWED_LEASES * report.lease_seconds for one in leads)
    return asdict(report) | {
        "seconds": round(seconds, 1),
        "leads_median_seconds": round(median(leads), 3),
        "leads_longest_seconds": round(max(leads), 3),
        "serves_median_seconds": round(median(serves), 3),
        "serves_longest_seconds": round(max(serves), 3),
        "within_allowed": within,
        "allowed_seconds": ALLOWED_LEASES * report.lease_seconds,
        "ok": not report.faults and within == len(leads),
    }


def main() -> int:
    """Exit code 1: something was lost or made up, or a take-over took too long."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--lease", type=float, default=1.0, metavar="S", help="seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(measure(arguments.kills, arguments.lease, Path(folder)))
    found = figures(report, time.monotonic() - began)
    print(report.text())
    for fault in report.faults:
        print(f"FAULT {fault}")
    for number, one in enumerate(report.take_overs, 1):
        print(
            f"kill {number:3}: leads after {one.leads_seconds:.2f} s, a worker is answered "
            f"after {one.serves_seconds:.2f} s"
        )
    print(
        f"{found['within_allowed']} of {len(report.take_overs)} take-overs within "
        f"{found['allowed_seconds']:g} s"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
