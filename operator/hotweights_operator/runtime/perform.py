"""The only module that writes to the API server.

Each action is one server-side apply, fenced by the resourceVersion that it was decided on; what
comes back goes into the cache, so that the next decision sees it. In which order, and what becomes
of a refusal, is the loop's. Events go out after what they tell of was written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, assert_never

from hotweights_crds.base import API_VERSION
from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_crds.weightversion import WeightVersionStatus
from hotweights_kube import errors
from hotweights_kube.events import Notice, Recorder, Reference
from hotweights_kube.resources import NODE_WEIGHTS, WEIGHT_ROLLOUTS, WEIGHT_VERSIONS, Body, Resource
from hotweights_operator.model.actions import Action, AskResolve, Assign, CreateNodeWeights, Event
from hotweights_operator.model.objects import Rollout, Version
from hotweights_operator.runtime import observe
from hotweights_operator.runtime.cache import Cache, Kind

log = logging.getLogger(__name__)

# a manager of its own: its field keeps the spec from ever being empty, whoever goes
NODE_MANAGER = "hotweights-nodes"


class Writer(Protocol):
    """What performing needs of the API (`hotweights_kube.Api`). Each raises `KubeError`."""

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Body: ...

    async def create(
        self, resource: Resource, body: Body, *, manager: str = "hotweights"
    ) -> Body: ...

    async def apply(self, resource: Resource, body: Body, *, manager: str) -> Body:
        """Server-side apply (KEP-555): the manager's fields become those of ``body``, and fields
        that it had and that are missing there go.
        """
        ...

    async def merge_patch(
        self,
        resource: Resource,
        name: str,
        patch: Body,
        *,
        namespace: str | None = None,
        subresource: str | None = None,
        resource_version: str = "",
        manager: str = "hotweights",
    ) -> Body:
        """JSON merge patch (RFC 7396); refused with `Conflict` unless the object still has this
        resourceVersion (empty: whatever it has).
        """
        ...


@dataclass(slots=True)
class Performer:
    """Writes what was decided: production's `loop.Port`."""

    api: Writer
    cache: Cache
    recorder: Recorder
    namespace: str  # of the installation
    wrote: Callable[[Kind, str, Any], None] = lambda kind, key, old: None
    """Told after the cache has it, with what was there."""

    async def act(self, action: Action) -> None:
        """One server-side apply. Raises `KubeError`; after a conflict what is there has been read
        again.
        """
        try:
            body = await self._do(action)
        except (errors.Conflict, errors.NotFound):
            await self._refetch(action.node)
            raise
        self._keep("state", action.node, body, observe.node_state)
        if isinstance(action, Assign):
            await self.tell(action.events)

    async def write_rollout(self, rollout: Rollout, status: WeightRolloutStatus) -> None:
        """Replace the status. Raises `Conflict` when it was decided on the past."""
        body = await self._patch_status(WEIGHT_ROLLOUTS, "rollout", rollout, status)
        self._keep("rollout", f"{rollout.namespace}/{rollout.name}", body, observe.rollout)

    async def write_version(self, version: Version, status: WeightVersionStatus) -> None:
        """Replace a WeightVersion's status. Raises `Conflict` when it was decided on the past."""
        body = await self._patch_status(WEIGHT_VERSIONS, "version", version, status)
        self._keep("version", f"{version.namespace}/{version.name}", body, observe.version)

    async def tell(self, events: Iterable[Event]) -> None:
        """Say it; nothing depends on whether it is heard."""
        for event in events:
            about = event.regarding
            version = "v1" if about.kind == "Pod" else API_VERSION
            regarding = Reference(version, about.kind, about.name, about.uid, about.namespace)
            type_: Literal["Normal", "Warning"] = "Warning" if event.warning else "Normal"
            await self.recorder.record(Notice(regarding, event.reason, event.message, type_))

    async def _do(self, action: Action) -> Body:
        match action:
            case CreateNodeWeights():
                return await self.api.create(NODE_WEIGHTS, self._new(action), manager=NODE_MANAGER)
            case Assign():
                spec = {"rollouts": [action.entry.to_dict()] if action.entry else []}
                manager = f"hotweights-rollout-{action.uid}"
                return await self._apply(action.node, action.resource_version, spec, manager)
            case AskResolve():
                spec = {"resolve": [action.item.to_dict()] if action.item else []}
                manager = f"hotweights-version-{action.uid}"
                return await self._apply(action.node, action.resource_version, spec, manager)
            case _:
                assert_never(action)

    async def _apply(self, node: str, resource_version: str, spec: Body, manager: str) -> Body:
        """One manager's item of a list; an empty list takes it out again."""
        metadata = {"name": node, "namespace": self.namespace, "resourceVersion": resource_version}
        return await self.api.apply(
            NODE_WEIGHTS, {"metadata": metadata, "spec": spec}, manager=manager
        )

    def _new(self, action: CreateNodeWeights) -> Body:
        owner = {"apiVersion": "v1", "kind": "Node", "name": action.node, "uid": action.node_uid}
        metadata = {"name": action.node, "namespace": self.namespace, "ownerReferences": [owner]}
        # A spec whose last field is taken out by server-side apply becomes null, and is then
        # refused: so one field stays.
        spec = {"nodeName": action.node}
        return {
            "apiVersion": API_VERSION,
            "kind": NODE_WEIGHTS.kind,
            "metadata": metadata,
            "spec": spec,
        }

    async def _patch_status(
        self,
        resource: Resource,
        kind: Kind,
        thing: Rollout | Version,
        status: WeightRolloutStatus | WeightVersionStatus,
    ) -> Body:
        try:
            return await self.api.merge_patch(
                resource,
                thing.name,
                {"status": status.to_dict()},
                namespace=thing.namespace,
                subresource="status",
                resource_version=thing.resource_version,
                manager="hotweights-operator",
            )
        except (errors.Conflict, errors.NotFound):
            await self._refetch_thing(resource, kind, thing)
            raise

    async def _refetch(self, node: str) -> None:
        """A write was refused: see what is there, without waiting for the watch."""
        try:
            body = await self.api.get(NODE_WEIGHTS, node, self.namespace)
        except errors.NotFound:
            self._forget("state", node)
        except errors.KubeError as error:
            log.debug("node %s was not read again: %s", node, error)
        else:
            self._keep("state", node, body, observe.node_state)

    async def _refetch_thing(
        self, resource: Resource, kind: Kind, thing: Rollout | Version
    ) -> None:
        key = f"{thing.namespace}/{thing.name}"
        try:
            body = await self.api.get(resource, thing.name, thing.namespace)
        except errors.NotFound:
            self._forget(kind, key)
        except errors.KubeError as error:
            log.debug("%s was not read again: %s", key, error)
        else:
            self._keep(kind, key, body, observe.rollout if kind == "rollout" else observe.version)

    def _keep(self, kind: Kind, key: str, body: Body, parse: Callable[[Body], Any]) -> None:
        """It is so now. What does not fit this release is left to the watch, which counts and names
        it.
        """
        try:
            value = parse(body)
        except observe.Malformed as error:
            log.debug("%s", error)
            return
        old = self.cache.get(kind, key)
        if self.cache.put(kind, key, int(body["metadata"]["resourceVersion"]), value):
            self.wrote(kind, key, old)

    def _forget(self, kind: Kind, key: str) -> None:
        """It is gone; that it is a later state than what is known is all that is known."""
        old = self.cache.get(kind, key)
        if self.cache.drop(kind, key, self.cache.version_of(kind, key)):
            self.wrote(kind, key, old)
