"""No false commit and no lost one, whatever dies: real coordinators, a real Redis, and clients that
never rest.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.coordinator.ha.members import bearable_lease_seconds
from tests.coordinator.ha.storm import storm

KILLS = 20
GENEROUS = 10.0
"""How many leases a take-over may last here, where the machine may be busy; bench/coordinator_ha.py
is strict.
"""


@pytest.mark.timeout(900)
async def test_nothing_is_lost_or_made_up_while_everything_dies(tmp_path: Path) -> None:
    async with storm(tmp_path, bearable_lease_seconds()) as running:
        await running.run(KILLS)
    report = running.report
    print(report.text())
    assert report.faults == []
    assert (report.kills, report.redis_restarts, report.redis_hangs, report.freezes) == (
        KILLS,
        4,
        3,
        2,
    )
    assert (report.partitions, report.cuts) == (5, 100)
    assert report.commits >= KILLS
    # the machine may have become busier since the lease was chosen
    bearable = GENEROUS * max(report.lease_seconds, bearable_lease_seconds())
    assert all(one.leads_seconds < bearable for one in report.take_overs)
