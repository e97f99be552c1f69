"""``python -m hotweights_operator.simulate``: whole rollouts in memory, around the decisions that the operator takes.

``run`` tells the stories of many seeds, with faults and stale reads, and checks the invariants after every step. ``plan -f FILE``
prints what a WeightRollout would do, step by step, in a cluster without faults: before anybody applies it.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hotweights_crds.conditions import is_true
from hotweights_crds.weightrollout import VersionRef, WeightRolloutSpec
from hotweights_operator.model import Rollout
from hotweights_operator.sim.invariants import Violated
from hotweights_operator.sim.run import Simulation, simulate

_PLAN_STEPS = 400
_PLANNED_POD = {"app": "llm"}


def main(arguments: Sequence[str] | None = None) -> int:
    """1 when an invariant was violated, 2 when the input is no WeightRollout."""
    parser = argparse.ArgumentParser(prog="python -m hotweights_operator.simulate", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="many stories with faults, by seed")
    run.add_argument("--seeds", type=int, default=100, help="how many (default: %(default)s)")
    run.add_argument("--first", type=int, default=0, help="the first seed (default: %(default)s)")
    run.add_argument("--tell", action="store_true", help="print each story")
    plan = verbs.add_parser("plan", help="what one WeightRollout would do")
    plan.add_argument(
        "-f", "--file", type=Path, required=True, help="YAML with a WeightRollout; other objects are passed over"
    )
    plan.add_argument("--pods", type=int, default=6, help="pods that it selects (default: %(default)s)")
    plan.add_argument("--nodes", type=int, default=3, help="nodes that they are on (default: %(default)s)")
    read = parser.parse_args(arguments)
    if read.verb == "run":
        return _run(range(read.first, read.first + read.seeds), print if read.tell else None)
    return _plan(read.file, read.pods, read.nodes)


def _run(seeds: range, tell: Callable[[str], None] | None) -> int:
    ends: Counter[str] = Counter()
    for seed in seeds:
        if tell is not None:
            tell(f"seed {seed}")
        try:
            story = simulate(seed, tell) if tell is not None else simulate(seed)
        except Violated as violation:
            print(f"violated: {violation}", file=sys.stderr)
            return 1
        ends.update(rollout.status.phase for rollout in story.rollouts())
    told = ", ".join(f"{count} {phase}" for phase, count in ends.most_common())
    print(f"{len(seeds)} stories, every invariant held: {told}")
    return 0


def _plan(file: Path, pods: int, nodes: int) -> int:
    try:
        spec = _spec(file)
    except (OSError, yaml.YAMLError, ValidationError, LookupError) as error:
        print(f"{file}: {error}", file=sys.stderr)
        return 2
    return _tell_plan(spec, pods, nodes)


def _spec(file: Path) -> WeightRolloutSpec:
    """The rollout's spec, for the pods and versions of the simulated cluster."""
    bodies: list[Any] = [body for body in yaml.safe_load_all(file.read_text()) if isinstance(body, dict)]
    found = next((body for body in bodies if body.get("kind") == "WeightRollout"), None)
    if found is None:
        raise LookupError("there is no WeightRollout in it")
    spec = WeightRolloutSpec.from_dict(found["spec"])
    target = {"selector": {"matchLabels": _PLANNED_POD}}
    return WeightRolloutSpec.from_dict({**spec.to_dict(), "target": target, "paused": False})


def _tell_plan(spec: WeightRolloutSpec, pods: int, nodes: int) -> int:
    """First everybody serves v0, then comes the version; what happens is printed with its second."""
    plan = Simulation(0, with_faults=False)
    plan.draw = plan.fleet.draw = plan.operator.draw = random.Random(1)
    plan.set_up(spec.model_copy(update={"version_ref": VersionRef(name="v0")}), nodes, pods)
    _until_ready(plan)
    began, seen = plan.now, ""
    plan.put_rollout("rollout", spec.model_copy(update={"version_ref": VersionRef(name="v1")}))
    print(f"{pods} pods on {nodes} nodes serve the version before; {spec.version_ref.name} is applied")
    for _ in range(_PLAN_STEPS):
        plan.step(seconds=1.0)
        (rollout,) = plan.rollouts()
        line = _line(plan, rollout)
        if line != seen:
            seen = line
            print(f"{(plan.now - began).total_seconds():5.0f} s  {line.replace('v1', spec.version_ref.name)}")
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
    changing = sorted(pod.name for pod in plan.fleet.pods() if not pod.ready)
    pods = status.pods
    counts = f"{status.nodes.summary} nodes staged, {pods.prepared} prepared, {pods.updated} of {pods.desired} updated"
    return f"{status.phase:<10} {counts}" + (f", changing: {', '.join(changing)}" if changing else "")


if __name__ == "__main__":
    sys.exit(main())
