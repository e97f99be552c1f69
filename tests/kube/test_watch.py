"""The watch goes on whatever happens to the connection, and nothing that happened is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from hotweights_kube import errors
from hotweights_kube.client import Listing, Selection
from hotweights_kube.resources import NODE_WEIGHTS, Body, Resource
from hotweights_kube.watch import Change, Pace, watch

QUICK = Pace(backoff_seconds=(0.001, 0.002))


def thing(name: str, version: int) -> Body:
    return {"metadata": {"name": name, "uid": f"uid-{name}", "resourceVersion": str(version)}}


def event(kind: str, name: str, version: int) -> Body:
    return {"type": kind, "object": thing(name, version)}


class Script:
    """Answers lists and watches from two scripts; an exception in one is raised."""

    def __init__(self, lists: list[Any], streams: list[list[Any]]) -> None:
        self.lists, self.streams = lists, streams
        self.queries: list[dict[str, str]] = []

    async def list(self, resource: Resource, selection: Selection | None = None, *, page_size: int = 500) -> Listing:
        answer = self.lists.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return Listing(*answer)

    async def stream(
        self, resource: Resource, selection: Selection, query: Any, *, silence_seconds: float
    ) -> AsyncIterator[Body]:
        self.queries.append(dict(query))
        if not self.streams:
            await asyncio.Event().wait()
        for item in self.streams.pop(0):
            if isinstance(item, Exception):
                raise item
            yield item


async def follow(script: Script, count: int, troubles: list[errors.KubeError] | None = None) -> list[tuple[str, str]]:
    seen: list[Change] = []
    sink: list[errors.KubeError] = [] if troubles is None else troubles
    async with asyncio.timeout(1), aclosing(watch(script, NODE_WEIGHTS, pace=QUICK, on_trouble=sink.append)) as changes:
        async for change in changes:
            seen.append(change)
            if len(seen) == count:
                break
    return [(change.type, change.body.get("metadata", {}).get("name", "")) for change in seen]


async def test_everything_is_told_before_synced() -> None:
    script = Script([([thing("a", 1), thing("b", 2)], "2")], [[event("MODIFIED", "a", 3), event("DELETED", "b", 4)]])
    told = await follow(script, 5)
    assert told == [("ADDED", "a"), ("ADDED", "b"), ("SYNCED", ""), ("MODIFIED", "a"), ("DELETED", "b")]


async def test_it_goes_on_from_the_last_bookmark() -> None:
    script = Script([([], "1")], [[event("BOOKMARK", "", 70)], [event("ADDED", "a", 71)]])
    assert await follow(script, 2) == [("SYNCED", ""), ("ADDED", "a")]
    assert [query["resourceVersion"] for query in script.queries] == ["1", "70"]


async def test_a_forgotten_version_leads_to_a_new_list_and_what_vanished_is_deleted() -> None:
    gone = {"type": "ERROR", "object": {"code": 410, "message": "too old"}}
    script = Script([([thing("a", 1), thing("b", 1)], "1"), ([thing("b", 5)], "9")], [[gone]])
    told = await follow(script, 6)
    assert told[3:] == [("DELETED", "a"), ("MODIFIED", "b"), ("SYNCED", "")]


async def test_an_api_server_that_is_away_is_asked_again_until_it_is_back() -> None:
    away = errors.Unavailable("away")
    troubles: list[errors.KubeError] = []
    script = Script([away, away, ([thing("a", 1)], "1")], [[away], [event("MODIFIED", "a", 2)]])
    assert await follow(script, 3, troubles) == [("ADDED", "a"), ("SYNCED", ""), ("MODIFIED", "a")]
    assert troubles == [away, away, away]


def test_the_wait_grows_and_is_bounded() -> None:
    waits = [Pace().wait_seconds(failures, lambda: 1.0) for failures in (1, 2, 3, 50, 5000)]
    assert waits == [0.25, 0.5, 1.0, 8.0, 8.0]
