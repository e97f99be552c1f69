"""Asks the coordinator, whichever of several leads, and gives up in time.

Each call has a deadline. Until then it is sent again, to whoever is said to lead or to the next
endpoint, because every call may be made twice: that is a promise of the state machine. A DEALER
socket with numbered requests can't get stuck as REQ does: an answer that comes too late is nobody's
and is dropped. `Client` waits in the calling thread and may be shared by threads, `AsyncClient`
waits in a loop; what to do with an answer is decided once, in `_EndpointFailover`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from socket import getaddrinfo
from types import TracebackType
from typing import Any, NamedTuple, Self

import zmq
from zmq.utils.monitor import recv_monitor_message

from hotweights_common.reasons import Reason
from hotweights_coordinator.wire import address, auth, handshake
from hotweights_coordinator.wire.messages import (
    MAX_BINARY_NBYTES,
    Answer,
    CallRefused,
    CoordinatorUnreachable,
    parse_answer,
    request_frames,
)

ENDPOINT_VARIABLE = "HOTWEIGHTS_COORD"
# without a connection; then it is asked for so long whether we are let in at all, and, where that
# stayed open, again after twice the time: who is kept waiting by its machine needs longer for a no
DOUBT_SECONDS = 0.25
LOOK_SECONDS = 0.1  # how often it is seen that a connection is gone
AGAIN_SECONDS = 0.1  # between two tries while nobody leads
CONNECT_SECONDS = 1.0  # for a connection, where there is another endpoint to try
# for one that gave no answer last time: its socket goes on connecting while the others are asked
GONE_SECONDS = 0.1

# these say nothing about the call: another coordinator, or the same one later, may carry it out
_RETRIED = frozenset([Reason.NOT_LEADER, Reason.BACKEND_UNAVAILABLE])


class Reply(NamedTuple):
    """What a call gives, where the coordinator did not refuse it."""

    result: dict[str, Any]
    binary: bytes | None  # a plan or a manifest; None with all other methods


def default_endpoints() -> str:
    """What the environment says, else the usual place on this host."""
    return os.environ.get(ENDPOINT_VARIABLE) or address.DEFAULT_ENDPOINT


class _EndpointFailover:
    """Where a client goes next. Knows no socket."""

    def __init__(
        self,
        endpoints: str | Sequence[str] | None,
        token: str | None,
        curve: Path | None = None,
        *,
        prefers_leader: bool = False,
    ) -> None:
        given = default_endpoints() if endpoints is None else endpoints
        self.endpoints = address.split(given if isinstance(given, str) else list(given))
        self._token = os.environ.get(auth.TOKEN_VARIABLE, "") if token is None else token
        self._curve = curve
        self.keys = auth.ClientKeys.of(self._token, curve)
        # it is sent only inside what keys of a folder encrypt; else the keys follow from it
        self.secret = self._token if curve else ""
        self.at = self.endpoints[0]
        self._prefers_leader = prefers_leader
        self._gone: set[str] = set()
        self._ids = itertools.count(1)

    def frames(
        self, method: str, args: Mapping[str, Any], binary: bytes | None
    ) -> tuple[int, list[Any]]:
        call_id = next(self._ids)
        return call_id, request_frames(call_id, method, args, self.secret, binary)

    def check_handshake(self, at: str, until: float, most_seconds: float) -> None:
        """Asked where a connection does not come about. Raises `CallRefused` if we are not let in;
        waits for ``most_seconds`` at most.
        """
        seconds = min(until - time.monotonic(), most_seconds)
        if seconds > 0 and handshake.is_refused(at, self.keys, seconds):
            raise auth.not_taken(self._token, self._curve)

    def follow(self, refused: CallRefused | None) -> None:
        """To the leader where one is named, else to the next endpoint; None: there was no
        answer.
        """
        if refused is None:
            self._gone.add(self.at)
        # it leads, or reads its state: it is the one to be asked again
        if refused is not None and refused.reason == Reason.BACKEND_UNAVAILABLE:
            return
        if refused is not None and refused.leader and refused.leader != self.at:
            self.at = str(address.parse(refused.leader))
            return
        after = self.endpoints.index(self.at) + 1 if self.at in self.endpoints else 0
        self.at = self.endpoints[after % len(self.endpoints)]

    def accepted(self, answer: Answer) -> Reply | None:
        """What the caller gets; None: it has to be asked again. Raises the refusals that are
        final.
        """
        self._gone.discard(self.at)
        if answer.error is None:
            leader = answer.result.get("leader")
            if self._prefers_leader and answer.result.get("leads") is False and leader:
                self.at = str(address.parse(leader))
            return Reply(answer.result, answer.binary)
        if answer.error.reason not in _RETRIED:
            raise answer.error
        return None

    @property
    def connect_seconds(self) -> float:
        """A leader that was killed is named by its followers until its lease is over: waiting for
        it is in vain.
        """
        if self.at in self._gone and len(self.endpoints) > 1:
            return GONE_SECONDS
        return (
            CONNECT_SECONDS
            if len(self.endpoints) > 1 or self.at not in self.endpoints
            else float("inf")
        )

    def try_until(self, until: float, seconds: float) -> float:
        """One that is silent does not get the time of the others."""
        return min(until, time.monotonic() + seconds / len(self.endpoints))

    def given_up(self, seconds: float, last: CallRefused | None) -> Exception:
        if last is not None:
            return last
        if why := unresolvable(self.endpoints):
            return CoordinatorUnreachable(why)
        where = ", ".join(self.endpoints)
        what = f"no coordinator answers at {where} (waited {seconds:.3g} s)"
        return CoordinatorUnreachable(
            f"{what}: start one with `hotweights coord-serve`, or name another with "
            f"--endpoint or ${ENDPOINT_VARIABLE}"
        )


def _dealer(context: Any, endpoint: str, keys: auth.ClientKeys | None) -> Any:
    """A socket that only queues for a connection that stands, so that POLLOUT says whether one
    does.
    """
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)  # what was not sent yet would only come too late
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_BINARY_NBYTES)
    # milliseconds; within a call's time, however long the coordinator was away
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
    if keys is not None:
        keys.apply(socket)
    socket.connect(endpoint)
    return socket


def unresolvable(endpoints: Sequence[str]) -> str:
    """What is wrong where a name of these has no address; empty: all have one. For an error's text:
    ZeroMQ itself tries again for ever and says nothing.
    """
    for endpoint in endpoints:
        host = address.parse(endpoint).bare_host
        try:
            getaddrinfo(host, None)
        except OSError as error:
            return f"{endpoint}: {host} has no address ({error.strerror}): is the name right?"
    return ""


def _ms_until(moment: float) -> float:
    return max(0.0, (moment - time.monotonic()) * 1000)


class Client:
    """Calls that wait. ``token=None`` takes the environment's; ``curve`` is a folder of keys."""

    def __init__(
        self,
        endpoints: str | Sequence[str] | None = None,
        token: str | None = None,
        curve: Path | None = None,
        timeout_seconds: float = 5.0,
        *,
        prefers_leader: bool = False,
    ) -> None:
        """``prefers_leader``: after an answer of a follower, which knows less, the leader that it
        names is asked next. Without it, whoever looks at one coordinator goes on to see that one.
        """
        self.timeout_seconds = timeout_seconds
        self._course = _EndpointFailover(endpoints, token, curve, prefers_leader=prefers_leader)
        self._context = zmq.Context()
        self._sockets: dict[str, Any] = {}
        self._lock = threading.Lock()

    def call(
        self,
        method: str,
        *,
        binary: bytes | None = None,
        timeout_seconds: float | None = None,
        **args: Any,
    ) -> Reply:
        """One answer. Raises `CallRefused` where the coordinator says no, `CoordinatorUnreachable`
        where none answers in time.
        """
        seconds = self.timeout_seconds if timeout_seconds is None else timeout_seconds
        until = time.monotonic() + seconds
        last: CallRefused | None = None
        with self._lock:
            while time.monotonic() < until:
                answer = self._ask(method, args, binary, until, seconds)
                if answer is not None and (reply := self._course.accepted(answer)) is not None:
                    return reply
                last = answer.error if answer is not None else last
                self._course.follow(answer.error if answer is not None else None)
                if answer is not None:
                    time.sleep(max(0.0, min(AGAIN_SECONDS, until - time.monotonic())))
        raise self._course.given_up(seconds, last)

    def _ask(
        self,
        method: str,
        args: Mapping[str, Any],
        binary: bytes | None,
        until: float,
        seconds: float,
    ) -> Answer | None:
        """One try at one endpoint; None: no answer from there."""
        socket = self._socket()
        until = self._course.try_until(until, seconds)
        connect_until = min(until, time.monotonic() + self._course.connect_seconds)
        doubt = DOUBT_SECONDS
        while not socket.poll(_ms_until(min(connect_until, time.monotonic() + doubt)), zmq.POLLOUT):
            if time.monotonic() >= connect_until:
                return None
            try:
                self._course.check_handshake(self._course.at, connect_until, doubt)
            except CallRefused:
                self._drop(self._course.at)  # ZeroMQ may have given it up for good
                raise
            doubt *= 2
        call_id, frames = self._course.frames(method, args, binary)
        try:
            socket.send_multipart(frames, zmq.NOBLOCK, copy=binary is None)
        except zmq.Again:  # the connection went just now; whoever waits for another waits for ever
            return None
        while (left := until - time.monotonic()) > 0:
            if socket.poll(min(left, LOOK_SECONDS) * 1000):
                answer = parse_answer(socket.recv_multipart())
                if answer is not None and answer.call_id == call_id:
                    return answer
            elif not socket.getsockopt(zmq.EVENTS) & zmq.POLLOUT:
                return None
        self._drop(self._course.at)  # whatever is queued there would only come too late
        return None

    def _socket(self) -> Any:
        at = self._course.at
        if at not in self._sockets:
            self._sockets[at] = _dealer(self._context, at, self._course.keys)
        return self._sockets[at]

    def _drop(self, endpoint: str) -> None:
        self._sockets.pop(endpoint).close()

    def close(self) -> None:
        """Let go of every connection; nothing waits."""
        with self._lock:
            for endpoint in list(self._sockets):
                self._drop(endpoint)
            self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


class AsyncClient:
    """The same in a loop. Calls of one client wait for each other; ``context`` may be shared by
    many clients.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str] | None = None,
        token: str | None = None,
        curve: Path | None = None,
        timeout_seconds: float = 5.0,
        context: Any = None,
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self._course = _EndpointFailover(endpoints, token, curve)
        self._given = context  # or it could end while it is in use
        self._context = zmq.Context() if context is None else zmq.Context.shadow(context.underlying)
        self._sockets: dict[str, _Watched] = {}
        self._lock = asyncio.Lock()

    async def call(
        self,
        method: str,
        *,
        binary: bytes | None = None,
        timeout_seconds: float | None = None,
        **args: Any,
    ) -> Reply:
        """One answer. Raises `CallRefused` and `CoordinatorUnreachable`, as `Client.call`."""
        seconds = self.timeout_seconds if timeout_seconds is None else timeout_seconds
        until = time.monotonic() + seconds
        last: CallRefused | None = None
        async with self._lock:
            while time.monotonic() < until:
                answer = await self._ask(method, args, binary, until, seconds)
                if answer is not None and (reply := self._course.accepted(answer)) is not None:
                    return reply
                last = answer.error if answer is not None else last
                self._course.follow(answer.error if answer is not None else None)
                if answer is not None:
                    await asyncio.sleep(max(0.0, min(AGAIN_SECONDS, until - time.monotonic())))
        raise self._course.given_up(seconds, last)

    async def _ask(
        self,
        method: str,
        args: Mapping[str, Any],
        binary: bytes | None,
        until: float,
        seconds: float,
    ) -> Answer | None:
        watched = self._watched()
        until = self._course.try_until(until, seconds)
        connect_until = min(until, time.monotonic() + self._course.connect_seconds)
        at, doubt = self._course.at, DOUBT_SECONDS
        while not await watched.ready(zmq.POLLOUT, min(connect_until - time.monotonic(), doubt)):
            if time.monotonic() >= connect_until:
                return None
            try:
                await asyncio.to_thread(self._course.check_handshake, at, connect_until, doubt)
            except CallRefused:
                self._drop(at)
                raise
            doubt *= 2
        call_id, frames = self._course.frames(method, args, binary)
        try:
            watched.socket.send_multipart(frames, zmq.NOBLOCK, copy=binary is None)
        except zmq.Again:  # as above
            return None
        while (left := until - time.monotonic()) > 0:
            if await watched.ready(zmq.POLLIN, min(left, LOOK_SECONDS)):
                answer = parse_answer(watched.socket.recv_multipart(zmq.NOBLOCK))
                if answer is not None and answer.call_id == call_id:
                    return answer
            elif not watched.socket.getsockopt(zmq.EVENTS) & zmq.POLLOUT:
                return None
        self._drop(self._course.at)
        return None

    def _watched(self) -> _Watched:
        at = self._course.at
        if at not in self._sockets:
            self._sockets[at] = _Watched(_dealer(self._context, at, self._course.keys))
        return self._sockets[at]

    def _drop(self, endpoint: str) -> None:
        self._sockets.pop(endpoint).close()

    def unreachable(self, seconds: float) -> Exception:
        """What to raise for several calls that nobody answered within ``seconds``."""
        return self._course.given_up(seconds, None)

    async def close(self) -> None:
        """Let go of every connection; nothing waits."""
        for endpoint in list(self._sockets):
            self._drop(endpoint)
        if self._given is None:
            self._context.term()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self.close()


class _Watched:
    """A plain socket whose descriptor a loop watches: it is received from in the same turn of the
    loop in which it was seen to be readable. With `zmq.asyncio`, which takes as long (206 to 225 us
    a call against 167 to 240 us on loopback), the loop goes round in between; a connection that is
    lost then takes its message with it (``ZMQ_IMMEDIATE``), and receiving raises `zmq.Again`. The
    storm of `tests/coordinator/test_redis_ha.py` found it.
    """

    def __init__(self, socket: Any) -> None:
        self.socket = socket
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Future[None] | None = None
        self._fd = socket.getsockopt(zmq.FD)
        self._loop.add_reader(self._fd, self._stirred)

    async def ready(self, flag: int, seconds: float) -> bool:
        """Whether it can be received from (or sent to) within that time."""
        until = self._loop.time() + seconds
        while not self.socket.getsockopt(zmq.EVENTS) & flag:
            if self._loop.time() >= until:
                return False
            self._waiting = self._loop.create_future()
            alarm = self._loop.call_at(until, self._stirred) if seconds != float("inf") else None
            try:
                await self._waiting
            finally:
                self._waiting = None
                if alarm is not None:
                    alarm.cancel()
        return True

    def _stirred(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
        elif not self.socket.closed:
            try:
                self.socket.getsockopt(zmq.EVENTS)  # or the descriptor stays readable
            except zmq.ContextTerminated:
                self._loop.remove_reader(self._fd)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        self.socket.close()


class Subscriber:
    """Hears events, from now on. Whoever must know something asks instead: an event may get
    lost.
    """

    def __init__(
        self,
        endpoint: str,
        topics: Sequence[str] = (),
        curve: Path | None = None,
        token: str | None = None,
        *,
        connect_seconds: float | None = None,
    ) -> None:
        """``endpoint`` is where events are published (`address.events_endpoint`); no topics: all of
        them. ``token`` and ``curve`` as for `Client`. With ``connect_seconds`` a coordinator has to
        let us in within that time, or it raises `CoordinatorUnreachable`; no event would say so,
        since there may be none for hours.
        """
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.setsockopt(zmq.LINGER, 0)
        given = os.environ.get(auth.TOKEN_VARIABLE, "") if token is None else token
        if keys := auth.ClientKeys.of(given, curve):
            keys.apply(self._socket)
        for topic in topics or ("",):
            self._socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        if connect_seconds is None:
            self._socket.connect(endpoint)
            return
        with ExitStack() as undo:
            undo.callback(self.close)
            self._connect(endpoint, connect_seconds)
            undo.pop_all()

    def _connect(self, endpoint: str, seconds: float) -> None:
        """Raises `CoordinatorUnreachable`."""
        # before it connects: what has happened by then is told to nobody
        connections = self._socket.get_monitor_socket(
            zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
        )
        until, answers = time.monotonic() + seconds, False
        try:
            self._socket.connect(endpoint)
            while connections.poll(int(_ms_until(until))):
                if recv_monitor_message(connections)["event"] != zmq.EVENT_CONNECTED:
                    return
                answers = True
        finally:
            # one that nobody reads is full after 2,000 events, and then nothing connects any more
            self._socket.disable_monitor()
            connections.close()
        waited = f"(waited {seconds:.3g} s)"
        raise CoordinatorUnreachable(
            f"{endpoint} answers and does not let us in {waited}: give the coordinator's "
            "token or keys (--token-file, --curve)"
            if answers
            else unresolvable([endpoint])
            or f"nobody publishes events at {endpoint} {waited}: start a coordinator with "
            "`hotweights coord-serve`, or name where another publishes with --pub-endpoint"
        )

    def next(self, timeout_seconds: float) -> tuple[str, dict[str, Any]] | None:
        """The next event; None: there was none in that time."""
        if not self._socket.poll(int(timeout_seconds * 1000)):
            return None
        # further frames would be of a later release
        topic, body = self._socket.recv_multipart()[:2]
        return topic.decode(), json.loads(body)

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()
