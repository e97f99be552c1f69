"""One of several operator processes decides and writes: the one that holds the Lease. The others
hear everything and wait.

Two things keep an operator that was replaced from doing harm. `Fenced` lets no write begin that
could end after another may lead. That leaves what was on its way when the process, or the network,
stood still for longer than the lease: so whoever takes a lease that was not given up marks every
NodeWeights first (`fence`). From then on a write that was decided before is refused, because the
object has another resourceVersion, and whatever came before is in the answers, so the new
operator's budget counts it.

Who gives the lease up has nothing on its way any more, so nothing needs to be marked.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from hotweights_common.backoff import Backoff
from hotweights_kube import errors
from hotweights_kube.lease import Election
from hotweights_kube.resources import LEASES, Body, Resource
from hotweights_operator.runtime.perform import Writer

log = logging.getLogger(__name__)

LEASE_NAME = "hotweights-operator"
"""One for all operators that write to the same NodeWeights, whatever they are called."""
RELEASE_SECONDS = 2.0
"""How long giving the lease up may take; it runs out by itself otherwise."""
_JITTER = 0.2  # so that those who wait do not ask in step
_AGAIN = Backoff(0.5, 10.0)


class NotLeading(errors.KubeError):
    """This process may not write: another one may lead by now."""


@dataclass(slots=True)
class Leadership:
    """This process's lead: `take` it, `keep` it until it is lost, `release` it."""

    api: Writer
    election: Election
    namespace: str  # of the installation
    clock: Callable[[], float] = time.monotonic

    @property
    def leads(self) -> bool:
        """Whether this process may begin to write now."""
        return self.election.lead_seconds(self.clock()) > 0

    @property
    def _patience(self) -> float:
        """How long one try may take: half, so that there is another one."""
        return self.election.timing.renew_seconds / 2

    async def take(self) -> None:
        """Wait until this process leads."""
        holder: str | None = None
        while not self.leads:
            await self._try(self._patience)
            if self.leads:
                return
            if self.election.exists and self.election.holder != holder:
                holder = self.election.holder
                log.info("%s leads; this process stands by", holder or "nobody")
            await asyncio.sleep(
                self.election.timing.retry_seconds * (1 + _JITTER * random.random())
            )

    async def keep(self) -> None:
        """Renew, until the lead is lost."""
        while left := self.election.lead_seconds(self.clock()):
            await asyncio.sleep(min(self.election.timing.retry_seconds, left))
            await self._try(min(self.election.lead_seconds(self.clock()), self._patience))
        self.election.resign()
        log.warning("the lease %s/%s was not renewed in time: this process leads no more",
                    self.namespace, LEASE_NAME)  # fmt: skip

    async def release(self) -> None:
        """Give it up, so that another leads at once. Only when nothing is on its way any more."""
        if self.leads:
            await self._try(RELEASE_SECONDS, release=True)
        self.election.resign()

    async def _try(self, seconds: float, *, release: bool = False) -> None:
        """Read it and write it, as far as that is this process's to do."""
        election, is_leader = self.election, self.leads
        try:
            async with asyncio.timeout(seconds):
                if not is_leader:
                    await self._read()
                if election.may_try(self.clock()):
                    election.renewed(await self._write(release=release))
        except (errors.Conflict, errors.NotFound) as error:
            log.debug("the lease: %s", error)
            if is_leader:
                await self._look()
        except (errors.KubeError, TimeoutError) as error:
            log.warning("the lease %s/%s: %s", self.namespace, LEASE_NAME,
                        str(error) or f"no answer within {seconds:.0f} s")  # fmt: skip
            if is_leader:
                await self._look()  # perhaps the answer alone was lost

    async def _look(self) -> None:
        """After a write that failed: whose it is now."""
        try:
            async with asyncio.timeout(self.election.lead_seconds(self.clock())):
                await self._read()
        except (errors.KubeError, TimeoutError) as error:
            log.debug("the lease was not read: %s", error)

    async def _read(self) -> None:
        try:
            body = await self.api.get(LEASES, LEASE_NAME, self.namespace)
        except errors.NotFound:
            self.election.observed(None, self.clock())
        else:
            self.election.observed(body, self.clock())

    async def _write(self, *, release: bool) -> Body:
        exists = self.election.exists
        body = self.election.ask(
            LEASE_NAME, self.namespace, self.clock(), datetime.now(UTC), release=release
        )
        if not exists:
            return await self.api.create(LEASES, body, manager=LEASE_NAME)
        return await self.api.merge_patch(
            LEASES,
            LEASE_NAME,
            {"spec": body["spec"]},
            namespace=self.namespace,
            resource_version=body["metadata"]["resourceVersion"],
            manager=LEASE_NAME,
        )


@dataclass(slots=True)
class Fenced:
    """A `Writer` for as long as this process leads: what is begun has an answer before another may
    lead, or counts as lost. Raises `NotLeading` otherwise.
    """

    api: Writer
    leadership: Leadership

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Body:
        """One object; reading needs no lead."""
        return await self.api.get(resource, name, namespace)

    async def create(self, resource: Resource, body: Body, *, manager: str = "hotweights") -> Body:
        """As `Writer.create`."""
        return await self._bounded(lambda: self.api.create(resource, body, manager=manager))

    async def apply(self, resource: Resource, body: Body, *, manager: str) -> Body:
        """As `Writer.apply`."""
        return await self._bounded(lambda: self.api.apply(resource, body, manager=manager))

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
        """As `Writer.merge_patch`."""
        return await self._bounded(
            lambda: self.api.merge_patch(
                resource,
                name,
                patch,
                namespace=namespace,
                subresource=subresource,
                resource_version=resource_version,
                manager=manager,
            )
        )

    async def _bounded(self, begin: Callable[[], Awaitable[Body]]) -> Body:
        leadership = self.leadership
        seconds = leadership.election.safe_seconds(leadership.clock())
        if not leadership.leads:
            raise NotLeading("this operator leads no more: another one may. Nothing was written")
        try:
            async with asyncio.timeout(seconds):
                return await begin()
        except TimeoutError as error:
            raise errors.Unavailable(
                f"no answer within {seconds:.1f} s, when another operator may lead"
            ) from error


class NodeKeeper(Protocol):
    """Who knows the nodes' objects, and what became of them."""

    def nodes(self) -> Iterable[str]:
        """The names of all NodeWeights that are known."""
        ...

    async def mark(self, node: str, mark: str) -> None:
        """Annotate one, whatever it says, and remember the answer. Raises `KubeError`."""
        ...


async def fence(keeper: NodeKeeper, mark: str, tasks: int) -> None:
    """Mark every NodeWeights, so many at a time: see above. What is refused for good is named and
    left; what is not answered is tried until it is.
    """
    waiting = list(keeper.nodes())

    async def work() -> None:
        while waiting:
            await _mark(keeper, waiting.pop(), mark)

    began = time.monotonic()
    count = len(waiting)
    async with asyncio.TaskGroup() as group:
        for _ in range(tasks):
            group.create_task(work())
    log.info("marked %d nodes in %.1f s", count, time.monotonic() - began)


async def _mark(keeper: NodeKeeper, node: str, mark: str) -> None:
    failures = 0
    while True:
        try:
            await keeper.mark(node, mark)
        except errors.NotFound:
            return
        except (errors.Unavailable, errors.Conflict) as error:
            failures += 1
            log.debug("node %s was not marked: %s", node, error)
            await asyncio.sleep(_AGAIN.seconds(failures))
        except errors.KubeError as error:
            log.warning("node %s was not marked: %s. What the operator before this one had begun "
                        "to write there may still come", node, error)  # fmt: skip
            return
        else:
            return
