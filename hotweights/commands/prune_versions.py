"""``hotweights prune-versions``: which WeightVersions nobody needs any more.

A trainer that publishes every hour leaves 720 of them a month, and nothing else of ours grows with
their number. They are their author's objects, so the operator deletes none; this says which could
go. It reads what ``kubectl get`` prints and prints what ``kubectl delete`` reads: it talks to no
cluster itself, and whoever runs it needs no right that a user of kubectl does not have.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from typing import Annotated, Any

import typer

from hotweights.commands.options import JsonAnyway, counted
from hotweights_common.errors import HotweightsError
from hotweights_crds.base import API_VERSION

Body = dict[str, Any]
ADVICE = "give it what `kubectl get weightversions,weightrollouts -o json` prints"
KEEP = 10  # as many as a Deployment keeps of its ReplicaSets (revisionHistoryLimit)


class BadInput(HotweightsError):
    """What came over standard input is not what kubectl prints."""


def prune_versions(
    keep: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Of each model: how many unused ones stay, the newest."
        ),
    ] = KEEP,
    as_json: JsonAnyway = False,
) -> None:
    """Read WeightVersions and WeightRollouts, and print the versions that no rollout uses, but for
    the newest of each model.

    Example: kubectl get weightversions,weightrollouts -A -o json | hotweights prune-versions --keep
    10 | kubectl delete -f -
    """
    del as_json
    if sys.stdin.isatty():
        raise BadInput(f"nothing comes over standard input; {ADVICE}")
    found = unused(_objects(sys.stdin.read()), keep)
    items = [
        {
            "apiVersion": API_VERSION,
            "kind": "WeightVersion",
            "metadata": {"name": name, "namespace": namespace},
        }
        for namespace, name in found
    ]
    print(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    typer.echo(f"{counted(len(items), 'WeightVersion')} may go: no rollout uses them", err=True)


def unused(objects: list[Body], keep: int) -> list[tuple[str, str]]:
    """(namespace, name) of the versions that may go, the oldest first. A version is used that a
    rollout of its namespace names, or has as its target, stable, previous or held version, by name
    or by digest; while a rollout is on its way, all that are younger than its stable version are:
    pods may serve one that it passed by. Raises `BadInput`.
    """
    used: set[tuple[str, str]] = set()  # (namespace, name or digest)
    under_way: list[tuple[str, set[str], set[str]]] = []  # namespace, words, those of the stable
    versions: dict[tuple[str, str], list[Body]] = defaultdict(list)
    rollouts = 0
    for body in objects:
        namespace = str(body["metadata"].get("namespace", ""))
        if body["kind"] == "WeightRollout":
            rollouts += 1
            words, stable, complete = _words(body)
            used |= {(namespace, word) for word in words}
            if not complete:
                under_way.append((namespace, words, stable))
        elif body["kind"] == "WeightVersion":
            versions[namespace, str(body["spec"].get("model", ""))].append(body)
    if versions and not rollouts:
        raise BadInput(
            "there is no WeightRollout among the objects, so nothing is known to be used: get both "
            "kinds, kubectl get weightversions,weightrollouts -o json"
        )
    found: list[tuple[str, str, str]] = []
    for (namespace, _), several in versions.items():
        since = min(
            (
                _made(several, stable)
                for place, words, stable in under_way
                if place == namespace and _of(several, words)
            ),
            default=None,
        )
        idle = sorted(
            (
                str(body["metadata"].get("creationTimestamp", "")),
                namespace,
                body["metadata"]["name"],
            )
            for body in several
            if not used & {(namespace, body["metadata"]["name"]), (namespace, _digest(body))}
            and "deletionTimestamp" not in body["metadata"]
            and (since is None or str(body["metadata"].get("creationTimestamp", "")) < since)
        )
        found += idle[: max(0, len(idle) - keep)]
    return [(namespace, name) for _, namespace, name in sorted(found)]


def _words(rollout: Body) -> tuple[set[str], set[str], bool]:
    """Names and digests of the versions that a rollout has something to do with; those of the
    stable one; and whether that is all that its pods may serve. Raises `BadInput`.
    """
    try:
        status = rollout.get("status") or {}
        named = [status.get(key) or {} for key in ("target", "stable", "previous")]
        target, stable, _ = map(_said, named)
        wanted = str(rollout["spec"]["versionRef"]["name"])
        words = {wanted}.union(*map(_said, named + (status.get("held") or [])))
    except (KeyError, TypeError, AttributeError) as error:
        name = rollout["metadata"]["name"]
        raise BadInput(f"WeightRollout {name} has another shape than ours have") from error
    return words, stable, wanted in stable and target == stable


def _said(version: Body) -> set[str]:
    return {str(version.get(key) or "") for key in ("name", "digest")} - {""}


def _of(versions: list[Body], words: set[str]) -> list[Body]:
    return [body for body in versions if words & {body["metadata"]["name"], _digest(body)}]


def _made(versions: list[Body], words: set[str]) -> str:
    """When the version of these words was created; of none of them: before all others."""
    made = [str(body["metadata"].get("creationTimestamp", "")) for body in _of(versions, words)]
    return max(made, default="")


def _digest(version: Body) -> str:
    """What it was resolved to; empty: nothing yet."""
    return str((version.get("status") or {}).get("digest", ""))


def _objects(text: str) -> list[Body]:
    """The items of what ``kubectl get -o json`` printed. Raises `BadInput`."""
    try:
        items = json.loads(text)["items"]
        whole = all(item["kind"] and item["metadata"]["name"] and item["spec"] for item in items)
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"standard input is no list of objects; {ADVICE}") from error
    if not whole:
        raise BadInput(f"an object in it has no name or no spec; {ADVICE}")
    return list(items)
