"""Clients that do what real ones do, again and again, and write down what they are told."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import zmq.asyncio

from hotweights_coordinator.client.client import AsyncClient
from hotweights_coordinator.wire.messages import CoordinatorError
from hotweights_planner import plan as plans
from hotweights_planner.manifest import CHUNK_NBYTES, Manifest, Tensor
from tests.coordinator.ha.history import Said, Told

BEAT_SECONDS = 0.03


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a client waits, by the lease: a cluster that a busy machine needs a longer one for
    is slower in everything.
    """

    lease_seconds: float

    @property
    def call_seconds(self) -> float:
        return 2.0 * self.lease_seconds

    @property
    def look_seconds(self) -> float:
        return 0.3 * self.lease_seconds

    @property
    def attempt_seconds(self) -> float:
        """Then whoever began an attempt has given it up, and the coordinator does too."""
        return 3.0 * self.lease_seconds


@dataclass(slots=True)
class Notes:
    """All that was told and said."""

    told: list[Told] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    leaders: list[tuple[float, float, str]] = field(default_factory=list)
    """Who said of itself that it leads: asked, answered, endpoint."""
    answers: int = 0
    failures: int = 0

    def commits(self) -> set[int]:
        """Tokens that somebody was told are committed."""
        return {one.current for one in self.told if one.current}


class Actor:
    """One client with a name."""

    def __init__(
        self,
        name: str,
        endpoints: Sequence[str],
        context: zmq.asyncio.Context,
        notes: Notes,
        patience: Patience,
    ) -> None:
        self.name, self._notes, self._patience = name, notes, patience
        self._client = AsyncClient(
            endpoints, "", timeout_seconds=patience.call_seconds, context=context
        )

    async def _ask(
        self, method: str, seconds: float | None = None, binary: bytes | None = None, **args: Any
    ) -> tuple[float, dict[str, Any]] | None:
        """When it was asked and what was answered; None: it was refused, or nobody answered."""
        began = time.monotonic()
        try:
            reply = await self._client.call(method, binary=binary, timeout_seconds=seconds, **args)
        except CoordinatorError:
            self._notes.failures += 1
            return None
        self._notes.answers += 1
        return began, reply.result

    def _note(self, began: float, answer: dict[str, Any], decides: bool = True) -> None:
        current = answer.get("current") or {}
        phase = answer["state"]
        told = Told(
            *(
                began,
                time.monotonic(),
                self.name,
                decides,
                answer["token"],
                phase,
                answer.get("version", ""),
            ),
            current=current.get("token", 0)
            if "current" in answer
            else answer["token"]
            if phase == "committed"
            else None,
            current_version=current.get("version", "")
            if "current" in answer
            else answer.get("version", ""),
        )
        self._notes.told.append(told)

    async def run(self) -> None:
        """Do it until cancelled."""
        raise NotImplementedError

    async def close(self) -> None:
        await self._client.close()


class Worker(Actor):
    """Registers, beats, and precommits whatever is begun."""

    async def run(self) -> None:
        told = await self._registered()
        while True:
            if told["state"] == "begun":
                self._notes.said.append(Said(time.monotonic(), self.name, told["token"]))
                if (
                    answer := await self._ask("precommit", worker_id=self.name, token=told["token"])
                ) is not None:
                    # Without a version it says only which token is the newest: its own, or an
                    # abort's.
                    self._notes.told.append(
                        Told(
                            answer[0],
                            time.monotonic(),
                            self.name,
                            True,
                            answer[1]["token"],
                            answer[1]["state"],
                        )
                    )
            await asyncio.sleep(random.uniform(0, 2 * BEAT_SECONDS))
            if (answer := await self._ask("heartbeat", worker_id=self.name)) is not None:
                told = answer[1]
                self._note(*answer)

    async def _registered(self) -> dict[str, Any]:
        while True:
            answer = await self._ask("register", worker_id=self.name, host="h", instance=self.name)
            if answer is not None:
                self._note(*answer)
                return answer[1]
            await asyncio.sleep(BEAT_SECONDS)


class Operator(Actor):
    """Begins one version after the other, commits most of them, and gives the others up."""

    async def run(self) -> None:
        number = 0
        while True:
            number += 1
            await self._update(f"{self.name}-{number}")
            await asyncio.sleep(random.uniform(0, 2 * BEAT_SECONDS))

    async def _update(self, version: str) -> None:
        if await self._ask("submit_plan", binary=_plan(version)) is None:
            return
        at_once = random.random() < 0.3
        until = time.monotonic() + self._patience.attempt_seconds
        while time.monotonic() < until:
            answer = await self._ask(
                "begin",
                version=version,
                commit_when_ready=at_once,
                deadline_seconds=self._patience.attempt_seconds,
            )
            if answer is None:
                return
            self._note(*answer)
            if answer[1]["state"] == "committed":
                return
            if answer[1]["state"] == "precommitted":
                break
            await asyncio.sleep(BEAT_SECONDS)
        else:
            return
        if random.random() < 0.25:
            answer = await self._ask(
                "abort", reason="to see what happens", token=answer[1]["token"]
            )
        else:
            answer = await self._ask("commit", version=version, token=answer[1]["token"])
        if answer is not None:
            self._note(*answer)


class Observer(Actor):
    """Looks at one coordinator only, whether it leads or not."""

    def __init__(
        self, endpoint: str, context: zmq.asyncio.Context, notes: Notes, patience: Patience
    ) -> None:
        super().__init__(f"observer of {endpoint}", [endpoint], context, notes, patience)
        self._endpoint = endpoint

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(BEAT_SECONDS)

    async def look(self) -> dict[str, Any] | None:
        """Its status, noted."""
        answer = await self._ask("status", self._patience.look_seconds)
        if answer is None:
            return None
        self._note(*answer, decides=False)
        if answer[1]["leads"]:
            self._notes.leaders.append((answer[0], time.monotonic(), self._endpoint))
        return answer[1]


def _plan(version: str) -> bytes:
    tensor = Tensor(
        name="w",
        dtype="U8",
        shape=(8,),
        nbytes=8,
        file="a.safetensors",
        offset=80,
        chunks=("ab" * 32,),
    )
    manifest = Manifest(model="m", version=version, chunk_bytes=CHUNK_NBYTES, tensors=(tensor,))
    return plans.build(manifest, None, "file:///weights").text()
