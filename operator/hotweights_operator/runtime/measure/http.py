"""One value out of the JSON that a GET request gives."""

from __future__ import annotations

from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from hotweights_crds.analysis import HttpGet
from hotweights_operator.model.measurements import Reading
from hotweights_operator.runtime.measure.client import JsonClient, NoResult


async def measure(client: JsonClient, wanted: HttpGet) -> Reading:
    """The value at the path. Raises `NoResult`, also for a status that is no success."""
    status, answer = await client.ask(wanted.url, wanted.timeout_seconds)
    if not HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        moved = ", and redirects are not followed" if status < HTTPStatus.BAD_REQUEST else ""
        raise NoResult(f"{wanted.url}: status {status}{moved}")
    value, text = at(answer, wanted.json_path or "")
    return Reading(datetime.now(UTC), value, text)


def at(answer: Any, path: str) -> tuple[float | str | bool | None, str]:
    """The value at a path of names and list indices with dots between them, and a word if there is
    none. Raises `NoResult` for what is no value.
    """
    here, walked = answer, ""
    for part in path.split(".") if path else ():
        walked = f"{walked}.{part}" if walked else part
        if isinstance(here, dict) and part in here:
            here = here[part]
        elif isinstance(here, list) and part.isdecimal() and int(part) < len(here):
            here = here[int(part)]
        else:
            return None, f"the answer has no {walked}"
    if here is None:
        return None, f"{walked or 'the answer'} is null"
    if isinstance(here, bool | str):
        return here, ""
    if isinstance(here, int | float):
        try:
            return float(here), ""
        except OverflowError as error:
            raise NoResult(f"{walked or 'the answer'} is a number beyond all measure") from error
    kind = "an object" if isinstance(here, dict) else "a list"
    raise NoResult(f"{walked or 'the answer'} is {kind}: write a jsonPath that leads to a value")
