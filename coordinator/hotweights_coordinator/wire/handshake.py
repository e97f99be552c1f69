"""Why a connection does not come about: nobody is there, or whoever is does not take our keys.

ZeroMQ connects in the background and tries for ever, so a socket whose handshake is refused looks
like one that finds nobody. This asks once, on a socket of its own that is watched.
"""

from __future__ import annotations

import time

import zmq
from zmq.utils.monitor import recv_monitor_message

from hotweights_coordinator.wire.auth import ClientKeys

# it said so, or speaks with other keys than we do
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_HUNG_UP = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
TRIES = 2  # a coordinator that ends in the middle of a handshake hangs up too, once


def is_refused(endpoint: str, keys: ClientKeys | None, seconds: float) -> bool:
    """Whether somebody listens there and ends every handshake with these keys. False also where
    that was not certain within ``seconds``.
    """
    context = zmq.Context()
    try:
        with context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RECONNECT_IVL, 20)  # milliseconds
            if keys is not None:
                keys.apply(socket)
            watched = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_CONNECT_RETRIED
            watched |= _REFUSED | _HUNG_UP
            with socket.get_monitor_socket(watched) as events:
                events.setsockopt(zmq.LINGER, 0)
                socket.connect(endpoint)
                try:
                    return _watch(events, time.monotonic() + seconds)
                finally:
                    socket.monitor(None, 0)
    finally:
        context.term()


def _watch(events: zmq.Socket[bytes], until: float) -> bool:
    hung_up = 0
    while (left := until - time.monotonic()) > 0 and events.poll(int(left * 1000)):
        event = recv_monitor_message(events)["event"]
        if event & _HUNG_UP:
            hung_up += 1
        if event & _REFUSED or hung_up == TRIES:
            return True
        # it is tried again after a handshake too, and at once where nobody listens
        if event & zmq.EVENT_HANDSHAKE_SUCCEEDED or not hung_up:
            return False
    return False
