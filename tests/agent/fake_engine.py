"""An engine that speaks the wire in this process: a leader and its ranks, each on a connection of
its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

from hotweights.adapters.vllm.rank.image import Image
from hotweights_transports.handoff import frames, sockets


class Process:
    """One connection."""

    def __init__(self, path: Path, hello: frames.Hello) -> None:
        self.path, self.hello = path, hello
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def open(self) -> frames.Frame:
        """Connect and say hello; the agent's answer."""
        sockets.connect(self.sock, self.path, 30.0)
        sockets.send(self.sock, self.hello)
        self.sock.setblocking(False)
        frame, _ = await self.receive()
        return frame

    async def receive(self) -> tuple[frames.Frame, list[int]]:
        while True:
            try:
                return sockets.recv(self.sock)
            except BlockingIOError:
                await asyncio.sleep(0.005)
            except ConnectionResetError as error:
                raise sockets.ConnectionClosed("reset") from error

    def close(self) -> None:
        self.sock.close()


@dataclass
class FakeEngine:
    """Prepares whatever it is handed (and looks at it), commits whatever it is told to."""

    path: Path
    token: str
    world_size: int = 1
    state: str = "Booting"
    digest: str | None = None
    commit_token: int = 0
    tables: dict[str, dict[str, object]] = field(default_factory=dict)
    commits: list[frames.Commit] = field(default_factory=list)
    keeps: int = 0
    refuses: str = ""
    answers_commits: bool = True
    held: dict[str, Image] = field(default_factory=dict)  # mapped by the first rank
    processes: list[Process] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self) -> list[frames.Frame]:
        """Connect every process; the agent's answers."""
        answers = [await self._connect("rank", rank) for rank in range(self.world_size)]
        return [*answers, await self._connect("server", 0)]

    async def _connect(self, role: str, rank: int) -> frames.Frame:
        hello = frames.Hello(
            role=role,
            token=self.token,
            rank=rank,
            world_size=self.world_size,
            state=self.state,
            digest=self.digest,
            commit_token=self.commit_token,
            held=list(self.held) if role == "rank" else [],
        )
        process = Process(self.path, hello)
        self.processes.append(process)
        answer = await process.open()
        if isinstance(answer, frames.Welcome):
            self.tasks.append(asyncio.create_task(self._serve(process)))
        return answer

    async def stop(self) -> None:
        """Every process ends. Raises what ended one before, other than its connection."""
        for task in self.tasks:
            task.cancel()
        ends = await asyncio.gather(*self.tasks, return_exceptions=True)
        for process in self.processes:
            process.close()
        self.tasks, self.processes = [], []
        for end in ends:
            if isinstance(end, Exception) and not isinstance(end, OSError):
                raise end

    async def _serve(self, process: Process) -> None:
        gathered: dict[int, tuple[frames.Prepare, list[int]]] = {}
        while True:
            try:
                frame, fds = await process.receive()
            except sockets.ConnectionClosed:
                return
            match frame:
                case frames.Prepare():
                    gathered[frame.id] = (frame, fds)
                case frames.MoreSlabs():
                    gathered[frame.id][1].extend(fds)
                case frames.Commit() if self.answers_commits:
                    self.commits.append(frame)
                    self.state, self.digest, self.commit_token = (
                        "Serving",
                        frame.digest,
                        frame.commit_token,
                    )
                    sockets.send(
                        process.sock,
                        frames.Committed(frame.id, frame.digest, frame.commit_token, 0.042),
                    )
                case frames.Keep():
                    self.keeps += 1
                    self.state = "Serving"
                    sockets.send(process.sock, frames.Kept(frame.id, frame.commit_token))
                case frames.Release():
                    self.held.pop(frame.digest, None)
                    sockets.send(process.sock, frames.Released(frame.id, frame.digest))
                case _:
                    pass
            for id_, (prepare, held) in list(gathered.items()):
                if len(held) == prepare.slabs + 1:
                    del gathered[id_]
                    sockets.send(process.sock, self._prepare(prepare, held))

    def _prepare(self, frame: frames.Prepare, fds: list[int]) -> frames.Frame:
        table = json.loads(os.pread(fds[0], os.fstat(fds[0]).st_size, 0))
        self.held[frame.digest] = Image.open(fds, frame.digest)  # the older mapping goes
        for fd in fds:
            os.close(fd)
        if self.refuses:
            return frames.Rejected(frame.id, frame.digest, self.refuses, "the test says so")
        self.tables[frame.digest] = table
        return frames.Prepared(frame.id, frame.digest, 0.01, 1)


async def until(condition: object, seconds: float = 30.0) -> None:
    """Wait until a callable gives something true. A machine may let a process stand for seconds."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():  # type: ignore[operator]
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError("it did not come about in time")
        await asyncio.sleep(0.01)
