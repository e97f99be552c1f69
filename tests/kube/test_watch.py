"""The watch goes on whatever happens to the connection, and nothing that happened is lost."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

from hotweights_common.backoff import Backoff
from hotweights_kube import errors
from hotweights_kube.client import Listing, Selection
from hotweights_kube.resources import NODE_WEIGHTS, Body, Resource, name_of, version_of
from hotweights_kube.watch import Change, WatchTiming, watch

QUICK = WatchTiming(backoff=Backoff(0.001, 0.002))
SECONDS = 30.0  # for what takes milliseconds: others may have the processor meanwhile


def thing(name: str, version: int) -> Body:
    return {"metadata": {"name": name, "uid": f"uid-{name}", "resourceVersion": str(version)}}


def event(kind: str, name: str, version: int) -> Body:
    return {"type": kind, "object": thing(name, version)}


class Script:
    """Answers lists (each a version and its pages) and watches from two scripts; an exception in
    one is raised.
    """

    def __init__(self, lists: list[Any], streams: list[list[Any]]) -> None:
        self.lists, self.streams = lists, streams
        self.queries: list[dict[str, str]] = []

    async def pages(
        self, resource: Resource, selection: Selection | None = None
    ) -> AsyncGenerator[Listing, None]:
        answer = self.lists.pop(0)
        if isinstance(answer, Exception):
            raise answer
        version, *pages = answer
        for page in pages:
            if isinstance(page, Exception):
                raise page
            yield Listing(page, version)

    async def stream(
        self, resource: Resource, selection: Selection, query: Any, *, silence_seconds: float
    ) -> AsyncGenerator[Body, None]:
        self.queries.append(dict(query))
        if not self.streams:
            await asyncio.Event().wait()
        for item in self.streams.pop(0):
            if isinstance(item, Exception):
                raise item
            yield item


async def changes_of(
    script: Script, count: int, troubles: list[errors.KubeError] | None = None
) -> list[Change]:
    seen: list[Change] = []
    sink: list[errors.KubeError] = [] if troubles is None else troubles
    async with (
        asyncio.timeout(SECONDS),
        aclosing(watch(script, NODE_WEIGHTS, timing=QUICK, on_trouble=sink.append)) as changes,
    ):
        async for change in changes:
            seen.append(change)
            if len(seen) == count:
                break
    return seen


async def follow(
    script: Script, count: int, troubles: list[errors.KubeError] | None = None
) -> list[tuple[str, str]]:
    seen = await changes_of(script, count, troubles)
    return [(change.type, change.body.get("metadata", {}).get("name", "")) for change in seen]


async def test_everything_is_told_before_synced() -> None:
    script = Script(
        [("2", [thing("a", 1)], [thing("b", 2)])],
        [[event("MODIFIED", "a", 3), event("DELETED", "b", 4)]],
    )
    told = await follow(script, 5)
    assert told == [
        ("ADDED", "a"),
        ("ADDED", "b"),
        ("SYNCED", ""),
        ("MODIFIED", "a"),
        ("DELETED", "b"),
    ]


async def test_synced_says_what_there_is_and_when() -> None:
    script = Script([("7", [thing("a", 1)], [thing("b", 2)])], [])
    synced = (await changes_of(script, 3))[-1]
    assert version_of(synced.body) == "7"
    assert [(name_of(body), version_of(body)) for body in synced.listed] == [("a", "1"), ("b", "2")]


async def test_it_goes_on_from_the_last_bookmark() -> None:
    script = Script([("1", [])], [[event("BOOKMARK", "", 70)], [event("ADDED", "a", 71)]])
    assert await follow(script, 2) == [("SYNCED", ""), ("ADDED", "a")]
    assert [query["resourceVersion"] for query in script.queries] == ["1", "70"]


async def test_a_bookmark_is_heard() -> None:
    script = Script([("1", [], [])], [[event("BOOKMARK", "", 70)], [event("ADDED", "a", 71)]])
    heard: list[None] = []
    async with asyncio.timeout(SECONDS):
        async with aclosing(
            watch(script, NODE_WEIGHTS, timing=QUICK, on_heard=lambda: heard.append(None))
        ) as changes:
            async for change in changes:
                if change.type == "ADDED":
                    break
    assert len(heard) == 4, "two pages, a bookmark and an event"


GONE = {"type": "ERROR", "object": {"code": 410, "message": "too old"}}


async def test_what_vanished_unseen_is_deleted_by_the_list_that_does_not_have_it() -> None:
    script = Script([("1", [thing("a", 1), thing("b", 1)]), ("9", [thing("b", 5)])], [[GONE]])
    told = (await changes_of(script, 6))[3:]
    assert [(change.type, name_of(change.body)) for change in told] == [
        ("MODIFIED", "b"),
        ("DELETED", "a"),
        ("SYNCED", ""),
    ]
    assert version_of(told[1].body) == "9", "that it is gone is as new as the list"


@pytest.mark.parametrize("error", [errors.Expired("too old"), errors.Unavailable("away")])
async def test_a_list_that_breaks_off_deletes_nothing_and_is_begun_anew(
    error: errors.KubeError,
) -> None:
    whole = ("1", [thing("a", 1), thing("b", 1)])
    script = Script([whole, ("9", [thing("a", 2)], error), ("10", [thing("b", 1)])], [[GONE]])
    told = await follow(script, 7)
    assert told[3:] == [("MODIFIED", "a"), ("MODIFIED", "b"), ("DELETED", "a"), ("SYNCED", "")]


async def test_another_object_of_that_name_is_told_after_the_end_of_the_first() -> None:
    second = {"metadata": {"name": "a", "uid": "other", "resourceVersion": "5"}}
    script = Script([("1", [thing("a", 1)]), ("9", [second])], [[GONE]])
    told = (await changes_of(script, 5))[2:]
    assert [(change.type, change.body["metadata"].get("uid", "")) for change in told] == [
        ("DELETED", "uid-a"), ("ADDED", "other"), ("SYNCED", ""),
    ]  # fmt: skip
    assert version_of(told[0].body) == "1", "older than the second one, which must stay"


async def test_an_api_server_that_is_away_is_asked_again_until_it_is_back() -> None:
    away = errors.Unavailable("away")
    troubles: list[errors.KubeError] = []
    script = Script([away, away, ("1", [thing("a", 1)])], [[away], [event("MODIFIED", "a", 2)]])
    assert await follow(script, 3, troubles) == [("ADDED", "a"), ("SYNCED", ""), ("MODIFIED", "a")]
    assert troubles == [away, away, away]


@pytest.mark.parametrize(
    "error", [errors.Forbidden("no"), errors.Unavailable("503"), errors.NotFound("no CRD")]
)
async def test_no_trouble_ends_it(error: errors.KubeError) -> None:
    script = Script([*[error] * 100, ("1", [])], [*[[error]] * 100, [event("ADDED", "a", 2)]])
    assert await follow(script, 2, []) == [("SYNCED", ""), ("ADDED", "a")]


async def test_a_restored_etcd_is_told_of_before_its_list() -> None:
    """Within a watch, and by the list after it was lost."""
    lists = [("9", [thing("a", 8), thing("b", 9)]), ("5", [thing("a", 4)])]
    for stream in ([event("BOOKMARK", "", 4)], [errors.Expired("410")]):
        told = await follow(Script(list(lists), [stream]), 7)
        assert told[3:] == [("REWOUND", ""), ("MODIFIED", "a"), ("DELETED", "b"), ("SYNCED", "")]


async def test_a_watch_that_stays_silent_begins_with_a_list() -> None:
    """A restored etcd says nothing to whoever asks for what comes after a later version."""

    class Silent(Script):
        async def stream(
            self, resource: Resource, selection: Selection, query: Any, *, silence_seconds: float
        ) -> AsyncGenerator[Body, None]:
            self.queries.append(dict(query))
            await asyncio.sleep(silence_seconds)
            raise errors.Unavailable("nothing was heard")
            yield {}

    script = Silent([("9", [thing("a", 8)]), ("5", [thing("a", 4)])], [])
    timing = WatchTiming(silence_seconds=0.01, backoff=QUICK.backoff)
    seen = []
    async with (
        asyncio.timeout(SECONDS),
        aclosing(watch(script, NODE_WEIGHTS, timing=timing, on_trouble=lambda _: None)) as changes,
    ):
        async for change in changes:
            seen.append(change.type)
            if len(seen) == 5:
                break
    assert seen == ["ADDED", "SYNCED", "REWOUND", "MODIFIED", "SYNCED"]
    assert [query["resourceVersion"] for query in script.queries] == ["9"]


NODES, PER_PAGE, NODE_BYTES = 1000, 50, 26_000


class Fleet(Script):
    """Nodes as large as real ones (images, conditions, managed fields), made when their page is
    read.
    """

    def __init__(self) -> None:
        super().__init__([], [])

    async def pages(
        self, resource: Resource, selection: Selection | None = None
    ) -> AsyncGenerator[Listing, None]:
        for first in range(0, NODES, PER_PAGE):
            yield Listing([self.node(number) for number in range(first, first + PER_PAGE)], "1")

    def node(self, number: int) -> Body:
        images = [
            {"names": [f"image-{number}-{index}-" + "x" * 1950]}
            for index in range(NODE_BYTES // 2000)
        ]
        return {**thing(f"node-{number}", 1), "status": {"images": images}}


async def test_a_large_list_never_stands_in_memory_at_once() -> None:
    tracemalloc.start()
    async with aclosing(watch(Fleet(), NODE_WEIGHTS)) as changes:
        async for change in changes:
            if change.type == "SYNCED":
                break
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(change.listed) == NODES
    assert peak < 4 * PER_PAGE * NODE_BYTES, (
        f"{peak / 2**20:.1f} MiB; all of them are {NODES * NODE_BYTES >> 20} MiB"
    )
