"""Three coordinators on one Redis, clients that never rest, and everything that can die dying.

A storm says what it saw; whether that is allowed is `history.faults`'s to say.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import zmq.asyncio

from tests.coordinator.ha import history, ledger
from tests.coordinator.ha.actors import Actor, Notes, Observer, Operator, Patience, Worker
from tests.coordinator.ha.members import Coordinator
from tests.coordinator.ha.redis_server import RedisServer
from tests.coordinator.ha.road import Road

CLUSTER = "storm"
CUTS = 5
PATIENCE_LEASES = 60.0  # for anything that has to come about at last, on however busy a machine


@dataclass(slots=True)
class TakeOver:
    """From a leader's death to another that says it leads, and to the first worker that is
    answered.
    """

    leads_seconds: float
    serves_seconds: float


@dataclass(slots=True)
class Report:
    """What a storm did and saw."""

    lease_seconds: float
    kills: int = 0
    freezes: int = 0
    partitions: int = 0
    cuts: int = 0
    redis_restarts: int = 0
    redis_hangs: int = 0
    take_overs: list[TakeOver] = field(default_factory=list)
    commits: int = 0
    aborts: int = 0
    answers: int = 0
    failures: int = 0
    faults: list[str] = field(default_factory=list)

    def text(self) -> str:
        """For people."""
        leads = sorted(one.leads_seconds for one in self.take_overs)
        serves = sorted(one.serves_seconds for one in self.take_overs)
        took = (
            f"take-over after {leads[len(leads) // 2]:.2f} s (median), {leads[-1]:.2f} s (longest) "
            f"of a lease of {self.lease_seconds:g} s; a worker is answered after "
            f"{serves[len(serves) // 2]:.2f} s, {serves[-1]:.2f} s. "
            if leads
            else ""
        )
        return (
            f"{self.kills} leaders killed, {self.freezes} frozen, {self.partitions} cut off and "
            f"delivered late, {self.cuts} connections lost, Redis restarted {self.redis_restarts} "
            f"times and hung {self.redis_hangs} times: {self.commits} commits, {self.aborts} "
            f"aborts, {self.answers} answers, {self.failures} calls without one. "
            f"{took}{len(self.faults)} faults"
        )


class Storm:
    """A running cluster with its clients, and what may happen to it."""

    def __init__(
        self,
        redis: RedisServer,
        roads: dict[str, Road],
        coordinators: list[Coordinator],
        notes: Notes,
        report: Report,
    ) -> None:
        self.redis, self.roads, self.coordinators, self.notes, self.report = (
            redis,
            roads,
            coordinators,
            notes,
            report,
        )

    async def run(self, kills: int) -> None:
        """So many kills, and all else now and then."""
        for number in range(1, kills + 1):
            await self.progress()
            await self.lose_connections()
            await self.kill_leader()
            if number % 4 == 0:
                await self.progress(1)
                await self.cut_leader_off()
            if number % 5 == 0:
                await self.restart_redis(signal.SIGTERM if number % 10 else signal.SIGKILL)
            if number % 6 == 0:
                await self.progress(1)
                await self.hang_redis()
            if number % 7 == 0:
                await self.progress(1)
                await self.freeze_leader()
        await self.progress()

    async def leader(self) -> Coordinator:
        """Who said last that it leads, not long ago."""
        found: list[Coordinator] = []

        def known() -> bool:
            if self.notes.leaders:
                asked, _, endpoint = self.notes.leaders[-1]
                found[:] = [
                    one for one in self.coordinators if one.endpoint == endpoint and one.runs
                ]
                return bool(found) and time.monotonic() - asked < self.report.lease_seconds / 4
            return False

        await self._until(known, "leader")
        return found[0]

    async def progress(self, commits: int = 2) -> None:
        """Until some more is committed."""
        before = len(self.notes.commits())
        await self._until(lambda: len(self.notes.commits()) >= before + commits, "further commit")

    async def kill_leader(self) -> None:
        """SIGKILL in the middle of whatever it does; it comes back when another leads."""
        await asyncio.sleep(random.uniform(0, 0.1))
        victim = await self.leader()
        victim.kill()
        self.report.kills += 1
        self.report.take_overs.append(await self._take_over(victim))
        victim.start()

    async def freeze_leader(self) -> None:
        """Let it sleep until another leads, and then go on as if nothing was."""
        victim = await self.leader()
        victim.freeze()
        self.report.freezes += 1
        await self._take_over(victim)
        await self.progress(1)
        victim.thaw()

    async def cut_leader_off(self) -> None:
        """Keep what it sends to Redis until another leads, and deliver it then."""
        victim = await self.leader()
        self.roads[victim.name].hold()
        self.report.partitions += 1
        await self._take_over(victim)
        await self.progress(1)
        self.roads[victim.name].release()
        await self.progress(1)

    async def lose_connections(self) -> None:
        """Take the leader's connections to Redis away, a few times, in the middle of whatever they
        carry.
        """
        for _ in range(CUTS):
            self.roads[(await self.leader()).name].cut()
            self.report.cuts += 1
            await asyncio.sleep(random.uniform(0, 0.1))

    async def restart_redis(self, number: signal.Signals) -> None:
        """End it in the middle of whatever it writes, and start it with what it wrote."""
        await asyncio.to_thread(self.redis.stop, number)
        self.report.redis_restarts += 1
        await asyncio.sleep(random.uniform(0, self.report.lease_seconds / 2))
        await asyncio.to_thread(self.redis.start)
        await self.progress(1)

    async def hang_redis(self) -> None:
        """Let it answer nobody for about a lease; what was sent to it meanwhile it still does."""
        self.redis.freeze()
        self.report.redis_hangs += 1
        await asyncio.sleep(random.uniform(0.5, 1.5) * self.report.lease_seconds)
        self.redis.thaw()
        await self.progress(1)

    async def supervise(self) -> None:
        """Start again whoever came up while Redis was away, as a service manager does."""
        while True:
            for one in self.coordinators:
                if one.refused_to_start:
                    one.start()
            await asyncio.sleep(self.report.lease_seconds / 4)

    async def _take_over(self, victim: Coordinator) -> TakeOver:
        began = time.monotonic()
        told, leaders = len(self.notes.told), len(self.notes.leaders)

        def leads() -> float | None:
            seen = (
                ended
                for asked, ended, at in self.notes.leaders[leaders:]
                if asked > began and at != victim.endpoint
            )
            return next(seen, None)

        def serves() -> float | None:
            return next(
                (one.ended for one in self.notes.told[told:] if one.decides and one.began > began),
                None,
            )

        await self._until(lambda: leads() is not None and serves() is not None, "take-over")
        return TakeOver((leads() or began) - began, (serves() or began) - began)

    async def _until(self, done: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + PATIENCE_LEASES * self.report.lease_seconds
        while not done():
            if time.monotonic() > until:
                logs = "\n".join(
                    f"{one.name} runs: {one.runs}\n{one.log()[-1500:]}" for one in self.coordinators
                )
                raise TimeoutError(f"no {what} in time; last {self.notes.told[-1:]}\n{logs}")
            await asyncio.sleep(0.01)


@asynccontextmanager
async def storm(
    folder: Path, lease_seconds: float, workers: int = 4, operators: int = 2
) -> AsyncIterator[Storm]:
    """The cluster and its clients at work; at the end the report is complete."""
    redis = RedisServer(folder)
    redis.start()
    roads = {name: Road(redis.port) for name in ("a", "b", "c")}
    for road in roads.values():
        await road.open()
    coordinators = [
        Coordinator(name, f"redis://127.0.0.1:{road.port}/0", CLUSTER, lease_seconds, folder)
        for name, road in roads.items()
    ]
    notes, report = Notes(), Report(lease_seconds)
    context, patience = zmq.asyncio.Context(), Patience(lease_seconds)
    endpoints = [one.endpoint for one in coordinators]
    observers = [Observer(endpoint, context, notes, patience) for endpoint in endpoints]
    crew = [Worker(f"w{number}", endpoints, context, notes, patience) for number in range(workers)]
    leaders = [
        Operator(f"o{number}", endpoints, context, notes, patience) for number in range(operators)
    ]
    actors: list[Actor] = [*observers, *crew, *leaders]
    running = Storm(redis, roads, coordinators, notes, report)
    supervisor = asyncio.create_task(running.supervise())
    try:
        for one in coordinators:
            one.start()
        tasks = [asyncio.create_task(one.run()) for one in [*observers, *crew]]
        try:
            await running._until(
                lambda: {one.who for one in notes.told} >= {one.name for one in crew}, "workers"
            )
            tasks += [asyncio.create_task(one.run()) for one in leaders]
            yield running
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        report.faults += [
            f"a client died: {one!r}"
            for one in ended
            if not isinstance(one, asyncio.CancelledError)
        ]
        report.faults += await _last_look(observers, folder)
    finally:
        supervisor.cancel()
        await asyncio.wait([supervisor])
        for actor in actors:
            await actor.close()
        context.term()
        for one in coordinators:
            one.kill()
        for road in roads.values():
            await road.close()
        redis.stop()
    states = ledger.read(folder, CLUSTER)
    report.commits = len({one.current for one in states} - {0})
    report.aborts = len({one.token for one in states if one.phase == "aborted"})
    report.answers, report.failures = notes.answers, notes.failures
    report.faults += history.faults(notes.told, notes.said, states, [one.name for one in crew])


async def _last_look(observers: list[Observer], folder: Path) -> list[str]:
    """When all is calm everybody says the same: what was written last."""
    faults = []
    for observer in observers:
        until = time.monotonic() + PATIENCE_LEASES
        while True:
            status, last = await observer.look(), ledger.read(folder, CLUSTER)[-1].current
            if status is not None and (status["current"] or {}).get("token", 0) == last:
                break
            if time.monotonic() > until:
                faults.append(
                    f"{observer.name} ends with {status and status['current']}, {last} was written "
                    "last"
                )
                break
            await asyncio.sleep(0.1)
    return faults
