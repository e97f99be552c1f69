"""Two kills of agents under load: `make agent-kills` does twenty, with a larger model and no more
memory than the documents ask for.
"""

from __future__ import annotations

from e2e.agent_kills import play
from e2e.harness.environment import Environment


def test_versions_are_found_again_where_they_lay_and_nobody_notices(
    environment: Environment,
) -> None:
    result = play(environment, 2, 0, 0)
    assert result.problems() == []
    assert [row.versions > 0 for row in result.rows] == [True, True]
