"""``kubectl hotweights history``: how a rollout's revisions ended."""

from __future__ import annotations

from typing import Any

from hotweights.kubectl import options
from hotweights.kubectl.options import Exit, Place
from hotweights.kubectl.views import table
from hotweights_common import timestamps
from hotweights_kube.resources import WEIGHT_ROLLOUTS
from hotweights_operator.model.objects import Rollout
from hotweights_operator.runtime import observe


def history(
    rollout: options.Rollout,
    namespace: options.Namespace = "",
    context: options.Context = "",
    kubeconfig: options.Kubeconfig = None,
    as_json: options.Json = False,
) -> None:
    """List a rollout's revisions, the newest first: version, outcome, and how long each took."""
    options.run(_history(Place(namespace, context, kubeconfig), rollout, as_json=as_json))


async def _history(place: Place, name: str, *, as_json: bool) -> int:
    async with place.connected() as (api, namespace):
        found = observe.rollout(await api.get(WEIGHT_ROLLOUTS, name, namespace))
    rows = entries(found)
    if as_json:
        options.tell({"namespace": found.namespace, "name": found.name, "revisions": rows})
    else:
        print(text(rows), end="")
    return Exit.DONE


def entries(rollout: Rollout) -> list[dict[str, Any]]:
    """The revisions, the newest first, that under way among them. ``seconds`` is None while one
    lasts.
    """
    status = rollout.status
    found: list[dict[str, Any]] = []
    if status.revision and all(e.revision != status.revision for e in status.history):
        found.append(
            {
                "revision": status.revision,
                "version": status.target.version,
                "outcome": status.phase,
                "startedAt": status.revision_started_at,
                "finishedAt": "",
                "seconds": None,
            }
        )
    for entry in status.history:
        start, end = timestamps.parse(entry.started_at), timestamps.parse(entry.finished_at)
        seconds = (end - start).total_seconds() if start and end else None
        found.append({**entry.to_dict(), "seconds": seconds})
    return found


def text(rows: list[dict[str, Any]]) -> str:
    """The same as a table."""
    lines = [
        [
            str(row["revision"]),
            row["version"] or "-",
            row["outcome"],
            row["startedAt"] or "-",
            table.span(row["seconds"]) if row["seconds"] is not None else "-",
        ]
        for row in rows
    ]
    return table.drawn(["REVISION", "VERSION", "OUTCOME", "STARTED", "TOOK"], lines)
