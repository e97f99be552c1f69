"""The coordinator's two sockets in an asyncio loop: calls come in and answers go out by one, events
go out by the other.

The loop watches the ROUTER's file descriptor itself, because that costs a tenth of what a future
for every message costs. ZeroMQ's descriptor tells edges, not levels: it must be looked at again
after every send too, or a call may lie there unseen. What a frame means is not known here, only who
sent it and whether with a REQ's empty frame.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import zmq
from zmq.auth.thread import ThreadAuthenticator

from hotweights_common.reasons import Reason
from hotweights_coordinator.wire import address
from hotweights_coordinator.wire.auth import ServerKeys
from hotweights_coordinator.wire.messages import MAX_JSON_NBYTES, CallRefused

MESSAGES_AT_ONCE = 200  # before the loop gets its turn
QUEUED_ANSWERS = 1000  # to one peer that does not read; more are dropped, and it asks again
# beyond a frame's own bytes: CURVE adds nonce, flags and authenticator (spec 26, "MESSAGE")
ENVELOPE_NBYTES = 1024
# milliseconds, for the handshake: until then a stranger may hold a connection and one frame
HANDSHAKE_MS = 5000
QUEUED_EVENTS = 20_000  # to one subscriber; nobody depends on hearing one


class Sender(NamedTuple):
    """Where an answer goes, and how that socket wants it."""

    route: bytes  # ROUTER's name of the connection
    is_req: bool  # REQ sends an empty frame first, and wants it back; DEALER does not


Received = Callable[[Sender, list[zmq.Frame]], None]


class Sockets:
    """Bound from construction until `close`; calls are handed over from `listen` on."""

    def __init__(self, endpoint: str, events_endpoint: str, keys: ServerKeys | None) -> None:
        """Raises `CallRefused` where an address cannot be bound."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = self._guard(keys.clients) if keys and keys.clients else None
        self._calls = self._context.socket(zmq.ROUTER)
        self._events = self._context.socket(zmq.PUB)
        self._received: Received | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled = False
        for socket, high_water in ((self._calls, QUEUED_ANSWERS), (self._events, QUEUED_EVENTS)):
            # what is not sent when it ends is asked for again; it must not keep the process
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.IPV6, 1)  # beside IPv4; ZeroMQ leaves it out by default
            socket.setsockopt(zmq.SNDHWM, high_water)
            # a thousand workers may come at once; Linux takes no more by default (listen(2))
            socket.setsockopt(zmq.BACKLOG, 4096)
            socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
            if keys:
                keys.apply(socket)
        self._calls.setsockopt(zmq.RCVHWM, 20_000)
        # of a frame, and before the handshake too; how many make a message nothing limits, which is
        # why nobody gets so far who may not ask
        self._calls.setsockopt(zmq.MAXMSGSIZE, MAX_JSON_NBYTES + ENVELOPE_NBYTES)
        self._events.setsockopt(zmq.MAXMSGSIZE, 1024)  # subscriptions
        try:
            self.endpoint = self._bind(self._calls, endpoint, "--endpoint")
            self.events_endpoint = self._bind_events(endpoint, events_endpoint)
        except CallRefused:
            self.close()
            raise

    def _guard(self, clients: Path) -> ThreadAuthenticator:
        guard = ThreadAuthenticator(self._context)
        guard.start()
        guard.configure_curve(domain="*", location=str(clients))
        return guard

    def _bind_events(self, endpoint: str, events_endpoint: str) -> str:
        wanted = events_endpoint or address.events_endpoint(self.endpoint)
        # where any port will do for calls, the next one may be taken by somebody else
        try:
            return self._bind(self._events, wanted, "--pub-endpoint")
        except CallRefused:
            if events_endpoint or address.parse(endpoint).port:
                raise
            return self._bind(
                self._events, str(address.parse(wanted)._replace(port=0)), "--pub-endpoint"
            )

    def _bind(self, socket: zmq.Socket[bytes], endpoint: str, option: str) -> str:
        host, port = address.parse(endpoint)
        try:
            socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            text = f"cannot bind {endpoint}: {error.strerror}"
            raise CallRefused(
                Reason.CANNOT_BIND,
                f"{text}; does another coordinator run? name another with {option}",
            ) from error
        bound = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        return str(address.Endpoint(host, address.parse(bound).port))

    def listen(self, received: Received) -> None:
        """Hand over what comes, in the running loop."""
        self._received = received
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._calls.FD, self.drain)
        self._again()

    def answer(self, to: Sender, frames: Sequence[bytes]) -> None:
        """Send, or drop it where that peer is gone or does not read. A big frame is not copied."""
        prefix = (to.route, b"") if to.is_req else (to.route,)
        self._send(self._calls, (*prefix, *frames), copy=len(frames) == 1)
        self._again()

    def publish(self, topic: bytes, event: bytes) -> None:
        """Send an event to whoever has subscribed to its topic; nobody is waited for."""
        self._send(self._events, (topic, event), copy=True)

    def _send(self, socket: zmq.Socket[bytes], frames: Sequence[bytes], copy: bool) -> None:
        try:
            socket.send_multipart(frames, zmq.NOBLOCK, copy=copy)
        except zmq.Again:  # its queue is full: it does not read
            return

    def drain(self) -> None:
        """Hand over what has come, but not so much that nothing else gets a turn."""
        self._scheduled = False
        if self._calls.closed or self._received is None:
            return
        for _ in range(MESSAGES_AT_ONCE):
            try:
                frames = self._calls.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            # ROUTER puts the connection's name first; what follows is as it was sent
            route, rest = frames[0].bytes, frames[1:]
            is_req = len(rest) > 1 and not len(rest[0])
            self._received(Sender(route, is_req), rest[1:] if is_req else rest)
        self._again()

    def _again(self) -> None:
        if not self._scheduled and self._loop is not None:
            self._scheduled = True
            self._loop.call_soon(self.drain)

    def close(self) -> None:
        """Let go of the addresses; what is not sent yet is lost."""
        if self._loop is not None and not self._calls.closed:
            self._loop.remove_reader(self._calls.FD)
        self._received = None
        self._calls.close()
        self._events.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()
