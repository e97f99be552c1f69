"""``python -m hotweights_operator.simulate``: whole rollouts in memory, around the decisions that
the operator takes.

``run`` tells the stories of many seeds, with faults and stale reads, checks the invariants after
every step, and prints how often each thing happened; what never happened was not tried. ``plan -f
FILE`` prints what a WeightRollout would do, step by step, in a cluster without faults: before
anybody applies it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from hotweights_crds.base import digest_label
from hotweights_crds.conditions import is_true
from hotweights_crds.weightrollout import VersionRef, WeightRolloutSpec
from hotweights_operator.model.objects import NodeState, Pod, Rollout
from hotweights_operator.sim import coverage as counts
from hotweights_operator.sim import story
from hotweights_operator.sim.coverage import Counts
from hotweights_operator.sim.invariants import Violated
from hotweights_operator.sim.run import Simulation

_PLAN_STEPS = 400  # of a second each: what is not over by then does not end
_PLANNED_POD = {"app": "rollout"}  # labels of the pods that the simulated cluster has
_SHOWN_VIOLATIONS = 20  # one fault violates in many seeds; --json has them all
SEEDS_FOR_ALL = 1000
"""In so many stories everything that has a name happens."""


def main(arguments: Sequence[str] | None = None) -> int:
    """1 when an invariant was violated or something never happened, 2 when the input is no
    WeightRollout.
    """
    parser = argparse.ArgumentParser(
        prog="python -m hotweights_operator.simulate", description=__doc__
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="many stories with faults, by seed")
    run.add_argument("--seeds", type=int, default=100, help="how many (default: %(default)s)")
    run.add_argument("--first", type=int, default=0, help="the first seed (default: %(default)s)")
    run.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)"
    )
    run.add_argument(
        "--ignore", action="append", default=[], metavar="NAME", help="go on after this violation"
    )
    run.add_argument(
        "--json", type=Path, metavar="FILE", help="write the counts and the violations there, too"
    )
    run.add_argument("--tell", action="store_true", help="print each story, in one process")
    plan = verbs.add_parser("plan", help="what one WeightRollout would do")
    plan.add_argument(
        "-f",
        "--file",
        type=Path,
        required=True,
        help="YAML with a WeightRollout; other objects are passed over",
    )
    plan.add_argument(
        "--pods", type=int, default=6, help="pods that it selects (default: %(default)s)"
    )
    plan.add_argument(
        "--nodes", type=int, default=3, help="nodes that they are on (default: %(default)s)"
    )
    read = parser.parse_args(arguments)
    if read.verb == "run":
        seeds = range(read.first, read.first + read.seeds)
        return _run(
            seeds, 1 if read.tell else read.jobs, tuple(read.ignore), read.json, tells=read.tell
        )
    return _plan(read.file, read.pods, read.nodes)


# -- run ----------------------------------------------------------------------------------------


class _Told(NamedTuple):
    """What came of one seed; ``phases`` are those that its rollouts ended in."""

    seed: int
    violation: str
    counts: Counts
    phases: list[str]


def _tell_one(seed: int, ignored: tuple[str, ...] = (), *, tells: bool = False) -> _Told:
    sim = Simulation(seed, print, ignored=ignored) if tells else Simulation(seed, ignored=ignored)
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # writes that are refused are the daily bread here
    try:
        sim.run()
    except Violated as violation:
        return _Told(seed, str(violation), sim.api.counts, [])
    finally:
        logging.disable(disabled)
    return _Told(seed, "", sim.api.counts, [rollout.status.phase for rollout in sim.rollouts()])


def _tell_all(seeds: range, jobs: int, ignored: tuple[str, ...], *, tells: bool) -> Iterator[_Told]:
    if jobs <= 1:
        for seed in seeds:
            if tells:
                print(f"seed {seed}")
            yield _tell_one(seed, ignored, tells=tells)
        return
    with ExitStack() as stack:
        pool = stack.enter_context(ProcessPoolExecutor(jobs))
        # first of all when somebody presses Ctrl-C: the pool's own end would wait for all stories
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        yield from pool.map(
            _tell_one, seeds, [ignored] * len(seeds), chunksize=max(1, min(20, len(seeds) // jobs))
        )


def _run(
    seeds: range, jobs: int, ignored: tuple[str, ...], file: Path | None, *, tells: bool
) -> int:
    if not seeds:
        print("no story was told", file=sys.stderr)
        return 2
    total: Counts = Counter()
    ends: Counts = Counter()
    violations: dict[int, str] = {}
    for told in _tell_all(seeds, jobs, ignored, tells=tells):
        total.update(told.counts)
        ends.update(told.phases)
        if told.violation:
            violations[told.seed] = told.violation
    names = counts.expected(story.names())
    missing = [name for name in names if not total[name]]
    print(counts.table(total, names))
    for violation in list(violations.values())[:_SHOWN_VIOLATIONS]:
        print(f"violated: {violation}", file=sys.stderr)
    phases = ", ".join(f"{count} {phase}" for phase, count in ends.most_common())
    held = (
        f"{len(violations)} of them violated an invariant" if violations else "every invariant held"
    )
    print(f"{len(seeds)} stories, {held}: {phases}")
    if file is not None:
        found = {
            "first": seeds.start,
            "seeds": len(seeds),
            "counts": dict(sorted(total.items())),
            "missing": missing,
        }
        file.write_text(json.dumps({**found, "violations": violations}, indent=1) + "\n")
    # with something ignored stories go other ways, and a short run cannot have seen everything
    is_long = len(seeds) >= SEEDS_FOR_ALL and not ignored
    if missing and is_long:
        print(f"never happened: {', '.join(missing)}", file=sys.stderr)
    return 1 if violations or (missing and is_long) else 0


# -- plan ---------------------------------------------------------------------------------------


def _plan(file: Path, pods: int, nodes: int) -> int:
    try:
        spec = _spec(file)
    except (OSError, yaml.YAMLError, ValidationError, LookupError) as error:
        print(f"{file}: {error}", file=sys.stderr)
        return 2
    return _tell_plan(spec, pods, nodes)


def _spec(file: Path) -> WeightRolloutSpec:
    """The rollout's spec, for the pods and versions of the simulated cluster."""
    bodies: list[Any] = [
        body for body in yaml.safe_load_all(file.read_text()) if isinstance(body, dict)
    ]
    found = next((body for body in bodies if body.get("kind") == "WeightRollout"), None)
    if found is None:
        raise LookupError("there is no WeightRollout in it")
    spec = WeightRolloutSpec.from_dict(found["spec"])
    target = {"selector": {"matchLabels": _PLANNED_POD}}
    return WeightRolloutSpec.from_dict({**spec.to_dict(), "target": target, "paused": False})


def _tell_plan(spec: WeightRolloutSpec, pods: int, nodes: int) -> int:
    """First everybody serves v0, then comes the version; what happens is printed with its
    second.
    """
    plan = Simulation(1, with_faults=False)
    plan.set_up(spec.model_copy(update={"version_ref": VersionRef(name="v0")}), nodes, pods)
    _until_ready(plan)
    began, seen = plan.now, ""
    plan.put_rollout(plan.apps[0], spec.model_copy(update={"version_ref": VersionRef(name="v1")}))
    print(
        f"{pods} pods on {nodes} nodes serve the version before; {spec.version_ref.name} is applied"
    )
    for _ in range(_PLAN_STEPS):
        plan.step(seconds=1.0)
        (rollout,) = plan.rollouts()
        line = _line(plan, rollout)
        if line != seen:
            seen = line
            print(
                f"{(plan.now - began).total_seconds():5.0f} s  "
                f"{line.replace('v1', spec.version_ref.name)}"
            )
        if is_true(rollout.status.conditions, "Ready") and rollout.status.target.name == "v1":
            return 0
    print("it did not come to an end: please report this", file=sys.stderr)
    return 1


def _until_ready(plan: Simulation) -> None:
    for _ in range(_PLAN_STEPS):
        plan.step()
        if all(is_true(rollout.status.conditions, "Ready") for rollout in plan.rollouts()):
            return


def _line(plan: Simulation, rollout: Rollout) -> str:
    status = rollout.status
    changing = sorted(
        f"pod-{pod.name.rpartition('-')[2]}" for pod in plan.fleet.pods() if _changes(plan, pod)
    )
    pods = status.pods
    counts = (
        f"{status.nodes.summary} nodes staged, {pods.prepared} prepared, {pods.updated} of "
        f"{pods.desired} updated"
    )
    return f"{status.phase:<10} {counts}" + (
        f", changing: {', '.join(changing)}" if changing else ""
    )


def _changes(plan: Simulation, pod: Pod) -> bool:
    """Whether it is of no service, or does not show yet what it was told."""
    state: NodeState | None = plan.api.get("state", pod.node)
    order = state.assigned(pod.uid) if state is not None else None
    told = digest_label(order.digest) if order is not None and order.digest else pod.digest_label
    return not pod.ready or pod.digest_label != told


if __name__ == "__main__":
    sys.exit(main())
