"""Six rounds of chaos, always the same ones: `make chaos` plays twenty, and any others.

The seed is one whose rounds have every change and six faults, and in which only one engine starts:
half the time of a round with one is vLLM's.
"""

from __future__ import annotations

from e2e.chaos.play import begin, play, settle
from e2e.chaos.rounds import BEGIN_REPLICAS, BEGIN_VERSION, choose
from e2e.harness.environment import Environment

SEED = 15263
ROUNDS = choose(SEED, 6)


def test_whatever_happens_it_converges_and_nobody_says_what_is_not_so(
    environment: Environment, cold: dict[str, list[int]]
) -> None:
    begin(environment)
    try:
        for planned in ROUNDS:
            row = play(environment, cold, SEED, planned)
            print(row.to_json())
            assert row.problems() == [], f"round {planned.number} of seed {SEED}: {planned}"
    finally:
        settle(environment, BEGIN_VERSION, BEGIN_REPLICAS)
