"""One number from a Prometheus: an instant query
(https://prometheus.io/docs/prometheus/latest/querying/api/#instant-queries).

A query that finds nothing has no value, which is not zero; one that finds several series has no one
value, and is an error rather than a guess.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from hotweights_crds.analysis import PrometheusQuery
from hotweights_operator.model.measurements import Reading
from hotweights_operator.runtime.measure.client import JsonClient, NoResult


async def measure(client: JsonClient, wanted: PrometheusQuery) -> Reading:
    """The query's value now. Raises `NoResult`."""
    seconds = wanted.timeout_seconds
    url = f"{wanted.address.rstrip('/')}/api/v1/query"
    # by POST, because a query may be longer than what a proxy takes as a URL
    form = {"query": wanted.query, "timeout": f"{seconds}s"}
    status, answer = await client.ask(url, seconds, form)
    if not isinstance(answer, dict) or answer.get("status") != "success":
        said = answer.get("error") if isinstance(answer, dict) else None
        raise NoResult(f"{url}: status {status}: {said or 'no answer of a Prometheus'}")
    value, text = _value(answer.get("data"))
    return Reading(datetime.now(UTC), value, text)


def _value(data: Any) -> tuple[float | None, str]:
    try:
        kind, result = data["resultType"], data["result"]
        if kind == "scalar":
            return float(result[1]), ""
        if kind == "vector":
            if len(result) > 1:
                raise NoResult(
                    f"the query gives {len(result)} series: reduce it to one, by sum() for example"
                )
            return (float(result[0]["value"][1]), "") if result else (None, "it finds no series")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise NoResult(f"not what a Prometheus answers: {error!r}") from error
    raise NoResult(f"the query gives a {kind}: write one that gives a scalar or a vector")
