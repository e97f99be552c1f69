"""``kubectl hotweights plan``: what a release would do, before anybody changes the spec."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from hotweights.kubectl import live, options
from hotweights.kubectl.options import Exit, Place
from hotweights.kubectl.views import plan_text
from hotweights.kubectl.views.snapshot import Snapshot
from hotweights_crds.conditions import Condition, upsert
from hotweights_operator.model.objects import Version

UNRESOLVED = "sha256:" + "0" * 64
"""Stands for the digest of a version that has none yet."""


def plan(
    rollout: options.Rollout,
    to: Annotated[
        str, typer.Option(metavar="VERSION", help="Name of the WeightVersion, or its version.")
    ],
    namespace: options.Namespace = "",
    context: options.Context = "",
    kubeconfig: options.Kubeconfig = None,
    as_json: options.Json = False,
) -> None:
    """Say what a release of this version would do; nothing is written.

    Which nodes fetch how much from whom, in which order pods change, where a canary waits, and how
    long it takes. The operator's own decisions are played on the cluster as it is, in memory. Bytes and times are
    estimates by what was measured here before, and say so.

    Example: kubectl hotweights plan tiny-llama --to v2
    """
    options.run(_plan(Place(namespace, context, kubeconfig), rollout, to, as_json=as_json))


async def _plan(place: Place, name: str, to: str, *, as_json: bool) -> int:
    # the simulator is large, and no other command needs it
    from hotweights.kubectl.views import estimates, foresight

    async with place.connected() as (api, namespace):
        # all of them: which pods are whose is a matter of all rollouts of the namespace
        shot = (await live.read(api, live.sources(namespace))).snapshot()
        rollout = shot.rollout(name)
        if rollout is None:
            raise options.not_found(f"there is no WeightRollout {name} in namespace {namespace}")
        version = _version(shot, to, rollout.namespace)
    known = version.usable
    found = foresight.foresee(
        shot, rollout, version if known else _usable(version), estimates.measured(shot)
    )
    told = plan_text.Plan(shot, rollout, version, found)
    if as_json:
        options.tell(told.to_dict())
    else:
        print(told.text(), end="")
    return Exit.DONE


def _version(shot: Snapshot, to: str, namespace: str) -> Version:
    """The WeightVersion that is meant. Raises `Failed`."""
    version = shot.version(to, namespace)
    if version is not None:
        return version
    names = ", ".join(sorted(v.name for v in shot.versions or ())[:20]) or "none"
    raise options.not_found(
        f"namespace {namespace} has no WeightVersion {to}, nor one alone with this version; there "
        f"are: {names}"
    )


def _usable(version: Version) -> Version:
    """One whose source was not read yet, as if it had been: its bytes are not known."""
    ready = Condition(type="Ready", status="True", reason="Assumed", last_transition_time="")
    digest = version.status.digest or UNRESOLVED
    conditions = upsert(version.status.conditions, ready)
    update = {"digest": digest, "conditions": conditions}
    return replace(version, status=version.status.model_copy(update=update))
