"""Any other rank's side of a group: it comes to the head, takes part, and stays as long as others
may need it.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Mapping
from typing import Final

from hotweights_transports.broadcast.channel import Channel, Message, check_reach
from hotweights_transports.broadcast.group import MAX_WHY, GroupTimeouts, Terms, start_member
from hotweights_transports.broadcast.hydra import START_SECONDS
from hotweights_transports.broadcast.rank_process import RankProcess
from hotweights_transports.peers.base import (
    PeerError,
    PeerProtocolError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
)
from hotweights_transports.peers.stream import address as addresses

log = logging.getLogger(__name__)

AGAIN_SECONDS: Final = 0.1  # between two tries to reach a head that does not listen yet


class GroupMember:
    """The same calls as `GroupLeader`, in the process of any other rank's node, and from the same
    threads. The constructor joins, and raises `PeerError` when it cannot; after an error in
    `gather` only `close` may be called.
    """

    def __init__(
        self,
        rank: int,
        address: str,
        port: int,
        terms: Terms,
        pull_port: int,
        patience: GroupTimeouts,
    ) -> None:
        self.rank = rank
        self.terms = terms
        self.address = addresses.form(address, port, "mpi")
        self.member: RankProcess | None = None
        self.why = ""
        self.pull_addresses: Mapping[int, str] = {}
        self._patience = patience
        self._host = address
        self._over = ""
        self._heard_at = 0.0
        self._ended = threading.Event()  # the head said good-bye, or is gone
        self._told = threading.Event()
        self._thread: threading.Thread | None = None
        self._channel = self._join(port, pull_port)

    def gather(self) -> None:
        """Wait until the head begins; then `member` is this rank, or `why` says why there is none.
        Raises `PeerError` when the head refuses, says nothing in time, or is gone.
        """
        # the head waits for all to join, then for mpiexec, before it says a word
        begin = self._receive(
            self._patience.join_seconds + START_SECONDS + self._patience.message_seconds
        )
        launch, known = begin.get("launch"), begin.get("pull_addresses")
        if (
            begin.get("kind") != "begin"
            or not isinstance(launch, str)
            or not isinstance(known, dict)
        ):
            raise PeerProtocolError(self.address, "it sent something else than a beginning")
        self.pull_addresses = {
            int(rank): str(uri)
            for rank, uri in known.items()
            if rank.isdecimal() and _is_pull_address(uri)
        }
        self.why = str(begin.get("why", ""))[:MAX_WHY]
        if (begin.get("slots"), begin.get("slot_nbytes")) != (
            self.terms.slots,
            self.terms.slot_nbytes,
        ):
            self.why = self.why or "the head has another window or other buckets"
        self._thread = threading.Thread(target=self._listen, name="mpi group", daemon=True)
        self._thread.start()
        if launch and not self.why:
            heads = frozenset({self._host, self._reached})
            self.member, self.why = start_member(launch, self.rank, self.terms, heads)

    def give_up(self, why: str) -> None:
        """The collective is over on this node, and thereby for all."""
        self.why = self.why or why
        if self.member is not None:
            self.member.close()

    def reason(self) -> str:
        """What the head said about the end of the job, if it still can."""
        self._told.wait(self._patience.message_seconds)
        return self._over

    def progressed(self) -> None:
        """Tell the head, now and then, that this node is not standing still. From any thread, one
        at a time.
        """
        now = time.monotonic()
        if (
            # several times before the head would call it standing still, and no oftener
            now - self._heard_at > min(1.0, self._patience.stall_seconds / 4)
            and not self._ended.is_set()
        ):
            self._heard_at = now
            self._say({"kind": "moved"})

    def leave(self) -> None:
        """Say that this node has everything, and stay while the others may need it."""
        self._say({"kind": "done"})
        self._ended.wait(self._patience.stall_seconds)
        self.close()

    def close(self) -> None:
        """End the connection, the rank and the thread."""
        self._channel.hang_up()  # first: it wakes the thread that is joined below
        if self.member is not None:
            self.member.close()
        if self._thread is not None:
            self._thread.join(self._patience.message_seconds)
        self._channel.close()

    def _join(self, port: int, pull_port: int) -> Channel:
        """Again and again, because rank 0 may begin later than we do, or have no processor yet for
        who has come.
        """
        deadline = time.monotonic() + self._patience.join_seconds
        while True:
            try:
                return self._introduced(port, pull_port)
            except (OSError, PeerUnreachable, PeerTimeout) as error:
                if time.monotonic() > deadline:
                    text = f"no head within {self._patience.join_seconds:g} s: {error}"
                    raise PeerUnreachable(
                        self.address, f"{text}; start rank 0, or set MASTER_ADDR"
                    ) from error
            time.sleep(AGAIN_SECONDS)

    def _introduced(self, port: int, pull_port: int) -> Channel:
        seconds = self._patience.message_seconds
        sock = socket.create_connection((self._host, port), timeout=seconds)
        self._reached = str(sock.getpeername()[0])
        try:
            check_reach(self.address, self._reached, self.terms.secret)
        except PeerRefused:
            sock.close()
            raise
        channel = Channel(sock, self.address, self.terms.secret, head=False, seconds=seconds)
        try:
            channel.receive(seconds)  # the welcome, which proves that the head has the secret
            hello = {
                "kind": "hello",
                "rank": self.rank,
                "size": self.terms.size,
                "about": self.terms.about,
            }
            channel.send(hello | {"pull_port": pull_port}, seconds)
        except PeerError:
            channel.close()
            raise
        return channel

    def _receive(self, seconds: float) -> Message:
        message = self._channel.receive(seconds)
        if message.get("kind") == "refused":
            raise PeerRefused(self.address, str(message.get("why", ""))[:MAX_WHY])
        return message

    def _listen(self) -> None:
        while True:
            try:
                message = self._channel.receive(self._patience.stall_seconds)
            except PeerTimeout:
                continue  # nothing to say; a head that is gone closes the connection
            except PeerError:
                break
            if message.get("kind") == "over":
                self._over = str(message.get("why", ""))[:MAX_WHY]
                self._told.set()
            elif message.get("kind") == "bye":
                break
        self._told.set()
        self._ended.set()

    def _say(self, message: Message) -> None:
        try:
            self._channel.send(message, self._patience.message_seconds)
        except PeerError as error:
            log.info("%s", error)


def _is_pull_address(text: object) -> bool:
    """Whether the registry may be asked for it: a TCP peer, or nothing to pull there."""
    if not isinstance(text, str) or len(text) > 300:  # a host's name has 253 at most
        return False
    try:
        addresses.parse(text)
    except ValueError:
        return False
    return True
