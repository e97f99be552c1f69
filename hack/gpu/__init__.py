"""All that needs a GPU, in one go and in under eight minutes, on a machine that may have no network.

    python -m gpu pack build/gpu                    # here: what such a machine lacks, 45 MiB
    python3 hack/gpu/run.py --bundle build/gpu      # there: `make gpu`

`pack` fetches wheels and makes them small (`thin`); `assemble` lays them over the packages that the
machine has; `run` goes through the steps, each with a limit of its own, and writes what it measured
(`hardware`, the tests in ``e2e/gpu``, ``bench/commit.py``) as JSON. All but `pack` need nothing but
Python's standard library, and torch where it measures.
"""
