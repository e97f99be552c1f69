"""An API server that is a dictionary, for measuring who talks to it.

It does what a loop of decisions depends on: resourceVersions and the conflicts that they make,
generations, server-side apply of a manager's own items in a list, merge patches, an answer that
takes a while, and watches that tell a little later still. It knows no schema, no HTTP and no JSON:
bodies are plain dicts, made anew with every write and never changed once handed out. What it costs
is counted apart (`cpu_seconds`), so that it can be taken off what the process used.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hotweights_kube import errors
from hotweights_kube.resources import Body, Resource

LATENCY_SECONDS = 0.004
LISTS = ("rollouts", "resolve")
"""Fields of a spec in which every manager has items of its own, by ``uid``."""

Watcher = Callable[[Body], None]


class Server:
    """Objects by kind and name. Use it from one event loop; before one runs, objects are put there
    without anybody watching.
    """

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Body]] = {}
        self.requests: Counter[str] = Counter()
        """Answered requests by verb, and ``conflict``."""
        self.applied: dict[tuple[str, str], Body] = {}
        """(name, manager) → what was applied last."""
        self.cpu_seconds = 0.0
        self.stored: Watcher = lambda body: None
        """Called within the write: for those who keep the books."""
        self._version = 0
        self._owned: dict[tuple[str, str, str], set[str]] = {}  # (name, manager, field) → uids
        self._counting = False

    @contextmanager
    def counted(self) -> Iterator[None]:
        """CPU time of what is not the operator's."""
        if self._counting:
            yield
            return
        self._counting, began = True, time.thread_time()
        try:
            yield
        finally:
            self._counting = False
            self.cpu_seconds += time.thread_time() - began

    # -- what the operator asks -----------------------------------------------------------------

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Body:
        """One object."""
        return await self._answer("get", lambda: self._known(resource.kind, name))

    async def create(self, resource: Resource, body: Body, *, manager: str = "") -> Body:
        """A new object; events are counted and forgotten."""
        return await self._answer(f"create {resource.kind}", lambda: self._create(resource, body))

    async def apply(
        self, resource: Resource, body: Body, *, manager: str, force: bool = True
    ) -> Body:
        """A manager's items, and no others."""
        return await self._answer("apply", lambda: self.apply_now(resource.kind, body, manager))

    async def merge_patch(self, resource: Resource, name: str, patch: Body, **options: Any) -> Body:
        """Replace the named fields, fenced if a resourceVersion is given."""
        verb, version = f"patch {resource.kind}", options.get("resource_version", "")
        if resource.kind == "Event":
            return await self._answer(verb, lambda: patch)
        return await self._answer(verb, lambda: self.patch_now(resource.kind, name, patch, version))

    async def _answer(self, verb: str, act: Callable[[], Body]) -> Body:
        await asyncio.sleep(LATENCY_SECONDS / 2)
        with self.counted():
            self.requests[verb] += 1
            answer = act()
        await asyncio.sleep(LATENCY_SECONDS / 2)
        return answer

    # -- the same at once, for those who are part of the cluster --------------------------------

    def apply_now(self, kind: str, body: Body, manager: str) -> Body:
        """Server-side apply."""
        name, version = body["metadata"]["name"], body["metadata"].get("resourceVersion", "")
        known = self._fenced(kind, name, version)
        self.applied[name, manager] = body
        spec = {**known["spec"]}
        for field in LISTS:
            mine = self._owned.pop((name, manager, field), set())
            told = {item["uid"]: item for item in body["spec"].get(field, ())}
            if not mine and not told:
                continue
            gone = mine - told.keys()
            items = [
                told.pop(item["uid"], item)
                for item in spec.get(field, ())
                if item["uid"] not in gone
            ]
            spec[field] = [*items, *told.values()]
            self._owned[name, manager, field] = {
                item["uid"] for item in body["spec"].get(field, ())
            }
        return self.store(kind, {**known, "spec": spec})

    def patch_now(self, kind: str, name: str, patch: Body, version: str = "") -> Body:
        """Merge patch."""
        return self.store(kind, _merged(self._fenced(kind, name, version), patch))

    def store(self, kind: str, body: Body) -> Body:
        """The body with its next resourceVersion, and the next generation if the spec is another;
        as it was if nothing is.
        """
        name = body["metadata"]["name"]
        known = self.objects.setdefault(kind, {}).get(name)
        if known == body:
            return known
        self._version += 1
        generation = body["metadata"].get("generation", 0)
        if known is None or known.get("spec") != body.get("spec"):
            generation += 1
        metadata = {
            **body["metadata"],
            "resourceVersion": str(self._version),
            "generation": generation,
        }
        stored = self.objects[kind][name] = {"kind": kind, **body, "metadata": metadata}
        self.stored(stored)
        return stored

    def _create(self, resource: Resource, body: Body) -> Body:
        if resource.kind == "Event":
            return body
        name = body["metadata"]["name"]
        if name in self.objects.get(resource.kind, {}):
            raise errors.AlreadyExists(f"{resource.kind} {name} is there already")
        return self.store(
            resource.kind,
            {**body, "metadata": {"uid": f"{resource.kind}-{name}", **body["metadata"]}},
        )

    def _known(self, kind: str, name: str) -> Body:
        try:
            return self.objects[kind][name]
        except KeyError:
            raise errors.NotFound(f"there is no {kind} {name}") from None

    def _fenced(self, kind: str, name: str, version: str) -> Body:
        known = self._known(kind, name)
        if version and version != known["metadata"]["resourceVersion"]:
            self.requests["conflict"] += 1
            raise errors.Conflict(f"{kind} {name} has changed since {version}")
        return known


def _merged(body: Body, patch: Body) -> Body:
    """RFC 7396."""
    merged = {**body}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = (
                _merged(merged.get(key) or {}, value) if isinstance(value, dict) else value
            )
    return merged
