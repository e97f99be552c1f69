"""``kubectl hotweights doctor``: reads all that `checks` look at, and prints what they find."""

from __future__ import annotations

import asyncio
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from typing import Annotated

import typer

from hotweights.kubectl import live, options
from hotweights.kubectl.options import Exit, Place
from hotweights.kubectl.views import checks
from hotweights.kubectl.views.checks import Facts, Finding, Right
from hotweights_crds.base import GROUP
from hotweights_kube.client import Api, Selection
from hotweights_kube.errors import Forbidden, NotFound
from hotweights_kube.resources import (
    CUSTOM_RESOURCE_DEFINITIONS,
    DAEMON_SETS,
    DEPLOYMENTS,
    MUTATING_POLICIES,
    SELF_ACCESS_REVIEWS,
    VALIDATING_POLICIES,
    Body,
    Resource,
)

OURS = Selection(None, "app.kubernetes.io/name=hotweights")
RIGHTS = (
    Right("list", GROUP, "weightrollouts", "no command works without it"),
    Right("watch", GROUP, "weightrollouts", "status, get -w and every command wait by it"),
    Right(
        "patch", GROUP, "weightrollouts", "promote, abort, retry, rollback, pause and resume do it"
    ),
    Right("list", GROUP, "weightversions", "plan and doctor read them"),
    Right("list", "", "pods", "get, plan and doctor show them"),
)


def doctor(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="Only of this object, by its name.")
    ] = "",
    namespace: options.Namespace = "",
    all_namespaces: options.AllNamespaces = False,
    context: options.Context = "",
    kubeconfig: options.Kubeconfig = None,
    as_json: options.Json = False,
) -> None:
    """Look for what is wrong, and say how to put it right.

    It looks at definitions, operator, agents, releases, admission policies, pods without
    gate or plugin, versions that cannot be read, rollouts that stall, and your own rights. Exit
    code 1 where there is an error.

    Example: kubectl hotweights doctor -A
    """
    place = Place(namespace, context, kubeconfig, all_namespaces)
    options.run(_doctor(place, name, as_json=as_json))


async def _doctor(place: Place, name: str, *, as_json: bool) -> int:
    async with place.connected() as (api, namespace):
        facts = await read(api, namespace)
    found = [f for f in checks.examine(facts) if name in ("", *_names(f.subject))]
    if as_json:
        options.tell({"findings": [finding.to_dict() for finding in found]})
    else:
        print(text(found), end="")
    return Exit.NOT_SO if any(f.level == "Error" for f in found) else Exit.DONE


def _names(subject: str) -> tuple[str, str]:
    """``pod models/tiny-a`` → how people may name it."""
    last = subject.split()[-1]
    return last, last.rpartition("/")[2]


def text(found: list[Finding]) -> str:
    """For people."""
    if not found:
        return "nothing is wrong\n"
    return "\n".join(
        f"{finding.level}: {finding.subject}: {finding.message}\n  → {finding.remedy}\n"
        for finding in found
    )


async def read(api: Api, namespace: str | None) -> Facts:
    """All that checks look at; what may not be read is None."""
    store = await live.read(api, live.sources(namespace), needed=())
    resources = (
        CUSTOM_RESOURCE_DEFINITIONS,
        DEPLOYMENTS,
        DAEMON_SETS,
        MUTATING_POLICIES,
        VALIDATING_POLICIES,
    )
    selections = [Selection(), OURS, OURS, OURS, OURS]
    absent: set[str] = set()
    lists, refused = await asyncio.gather(
        asyncio.gather(
            *(_list(api, r, s, absent) for r, s in zip(resources, selections, strict=True))
        ),
        _refused(api, namespace),
    )
    definitions, deployments, daemon_sets, mutating, validating = lists
    return Facts(
        snapshot=store.snapshot(),
        release=release(),
        definitions=definitions,
        deployments=deployments,
        daemon_sets=daemon_sets,
        mutating_policies=mutating,
        validating_policies=validating,
        pods=list((store.bodies["pod"] or {}).values()),
        refused=refused,
        absent=frozenset(absent),
    )


def release() -> str:
    """Of this plugin."""
    try:
        return version_of("hotweights")
    except PackageNotFoundError:
        return "0+unknown"


async def _list(
    api: Api, resource: Resource, selection: Selection, absent: set[str]
) -> list[Body] | None:
    try:
        return (await api.list(resource, selection)).items
    except Forbidden:
        return None
    except NotFound:
        absent.add(resource.kind)
        return None


async def _refused(api: Api, namespace: str | None) -> list[Right]:
    """Which of `RIGHTS` the caller has not."""

    async def is_allowed(right: Right) -> bool:
        attributes = {
            "verb": right.verb,
            "group": right.group,
            "resource": right.resource,
            "namespace": namespace or "",
        }
        review = {
            "apiVersion": SELF_ACCESS_REVIEWS.api_version,
            "kind": SELF_ACCESS_REVIEWS.kind,
            "spec": {"resourceAttributes": attributes},
        }
        answer = await api.post(SELF_ACCESS_REVIEWS, review)
        return bool((answer.get("status") or {}).get("allowed"))

    allowed = await asyncio.gather(*map(is_allowed, RIGHTS))
    return [right for right, may in zip(RIGHTS, allowed, strict=True) if not may]
