"""Rank 0's side of a group: it waits for the others, begins the job, and is the last to leave."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final

from hotweights_common import hosts
from hotweights_transports.broadcast.channel import Channel, Message, check_reach
from hotweights_transports.broadcast.group import MAX_WHY, GroupTimeouts, Terms, start_member
from hotweights_transports.broadcast.hydra import Mpiexec, MpiFailed, MpiUnavailable
from hotweights_transports.broadcast.rank_process import RankProcess
from hotweights_transports.peers.base import PeerError, PeerTimeout
from hotweights_transports.peers.stream import address as addresses

log = logging.getLogger(__name__)

MAX_STRANGERS: Final = 16  # each costs a thread; as many as a peers' server bears with


class GroupLeader:
    """Rank 0, in the process of the node that reads the source. `gather` first, then the
    collective if there is a `member`, and `leave` or `close` at the end. One thread makes these
    calls; any other may `close`, also twice, which ends whatever the first one waits for. Each
    member's connection has a thread of its own.
    """

    def __init__(
        self,
        address: str,
        port: int,
        terms: Terms,
        pull_port: int,
        patience: GroupTimeouts,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """``address``: under which the others know this node, ``pull_port``: where its own chunks
        can be pulled over TCP. Port 0 takes a free one. ``settings``: as `hydra.Mpiexec` takes
        them.
        """
        self.rank = 0
        self.terms = terms
        self.member: RankProcess | None = None
        self.why = ""
        self._patience = patience
        self._settings = settings
        self._host = address
        check_reach(f"mpi://{address}:{port}", address, terms.secret)
        # what others know us by need not be one of our interfaces
        listen = address if hosts.is_loopback(address) else hosts.anywhere(address)
        self._listener = addresses.listen(listen, port)
        self.port = int(self._listener.getsockname()[1])
        self.address = addresses.form(address, self.port, "mpi")
        self._changed = threading.Condition()  # of what follows
        self._channels: dict[int, Channel] = {}
        self._pull_addresses: dict[int, str] = {0: addresses.form(address, pull_port)}
        self._moved: dict[int, float] = {}  # rank that is not done: when it last got further
        self._strangers = 0
        self._begun = False
        self._closing = False
        self._head: Mpiexec | None = None
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept)

    @property
    def pull_addresses(self) -> Mapping[int, str]:
        """Rank by rank, where its chunks can be pulled."""
        with self._changed:
            return dict(self._pull_addresses)

    def gather(self) -> None:
        """Wait for all, then begin the job; without them, or without MPI, begin without a job:
        `member` is None then, and `why` says why. Raises nothing of it.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._channels) == self.terms.size - 1 or self._closing,
                self._patience.join_seconds,
            )
            absent = sorted(set(range(1, self.terms.size)) - self._channels.keys())
            given_up = self._closing
        if given_up:
            self.why = "the head gave it up"
        elif absent:
            who = ", ".join(map(str, absent))
            self.why = f"rank {who} did not come within {self._patience.join_seconds:g} s"
        elif self.terms.size == 1:
            self.why = "there is nobody else"
        launches: tuple[str, ...] = ()
        if not self.why:
            try:
                self._head = Mpiexec(self.terms.size, self._host, self._settings)
                launches = self._head.launches
            except (MpiFailed, MpiUnavailable) as error:
                self.why = str(error)
        with self._changed:
            self._begun = True
            channels = dict(self._channels)
        # the others first: our own rank waits in MPI until all are there
        for rank, channel in channels.items():
            self._say(channel, self._beginning(launches[rank] if launches else "", self.why))
        if launches:
            self._start(launches[0])

    def give_up(self, why: str) -> None:
        """The collective is over on this node: tell the others why, and end it for all."""
        with self._changed:
            channels = list(self._channels.values())
        for channel in channels:
            self._say(channel, {"kind": "over", "why": why[:MAX_WHY]})
        self.why = self.why or why
        if self.member is not None:
            self.member.close()

    def reason(self) -> str:
        """What mpiexec had to say about the end of the job."""
        return self._head.said[:MAX_WHY] if self._head is not None else ""

    def progressed(self) -> None:
        """This node got further; nobody waits for the head."""

    def leave(self) -> None:
        """Stay until everybody is done, gone, or standing still; then `close`."""
        with self._changed:
            # until now this node was at work itself, and nobody was to report
            self._moved = dict.fromkeys(self._moved, time.monotonic())
            while self._moved:
                now = time.monotonic()
                still = [
                    rank
                    for rank, at in self._moved.items()
                    if now - at > self._patience.stall_seconds
                ]
                for rank in still:
                    log.warning(
                        "%s: rank %d got no further for %g s",
                        self.address,
                        rank,
                        self._patience.stall_seconds,
                    )
                    del self._moved[rank]
                self._changed.wait(0.2)  # silence notifies nobody: look at the clock
            channels = list(self._channels.values())
        # first: who hears the good-bye may come again at once, to the next group
        self._stop_listening()
        for channel in channels:
            self._say(channel, {"kind": "bye"})
        self.close()

    def close(self) -> None:
        """End everything, the job included, and wait for the threads."""
        self._stop_listening()
        with self._changed:
            channels = list(self._channels.values())
        if self.member is not None:
            self.member.close()
        if self._head is not None:
            self._head.close()
        for channel in channels:
            channel.hang_up()
        for thread in self._threads:
            thread.join(self._patience.message_seconds + 1)  # it may be sending its last message

    def _stop_listening(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(); closing alone would not
        self._listener.close()

    def _start(self, line: str) -> None:
        self.member, self.why = start_member(line, 0, self.terms, frozenset({self._host}))

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="mpi group", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, (host, *_) = self._listener.accept()
            except OSError:
                return
            with self._changed:
                if self._closing or self._strangers >= MAX_STRANGERS:
                    sock.close()
                    continue
                self._strangers += 1
            self._spawn(self._converse, sock, host)

    def _converse(self, sock: socket.socket, host: str) -> None:
        try:
            channel = Channel(
                sock, host, self.terms.secret, head=True, seconds=self._patience.message_seconds
            )
        except PeerError as error:
            log.warning("%s: a stranger was turned away: %s", self.address, error)
            with self._changed:
                self._strangers -= 1
            return
        rank = 0
        with channel:
            try:
                try:
                    channel.send({"kind": "welcome"}, self._patience.message_seconds)
                    rank = self._admitted(channel, host)
                finally:
                    with self._changed:
                        self._strangers -= 1
                while rank:
                    # silence is judged by `leave`; who is gone closes
                    with contextlib.suppress(PeerTimeout):
                        self._hear(rank, channel.receive(self._patience.stall_seconds))
            except PeerError as error:
                log.info("%s: rank %s: %s", self.address, rank or "unknown", error)
            finally:
                with self._changed:
                    if self._channels.get(rank) is channel:
                        del self._channels[rank]
                        self._moved.pop(rank, None)
                    self._changed.notify_all()

    def _admitted(self, channel: Channel, host: str) -> int:
        """The rank of who came; 0 if it has no place here."""
        hello = channel.receive(self._patience.message_seconds)
        rank, pull_port = hello.get("rank"), hello.get("pull_port")
        ours: Message = {"size": self.terms.size, "about": self.terms.about}
        odd = [name for name, value in ours.items() if hello.get(name) != value]
        if type(rank) is not int or not 1 <= rank < self.terms.size or type(pull_port) is not int:
            text = f"rank {str(rank)[:20]} has no place in a group of {self.terms.size}"
        elif odd:
            text = (
                f"another {odd[0]}: here it is {ours[odd[0]]}, at rank {rank} "
                f"{str(hello.get(odd[0]))[:100]}"
            )
        else:
            with self._changed:
                if rank not in self._channels:
                    self._channels[rank] = channel
                    self._pull_addresses[rank] = addresses.form(host, pull_port)
                    self._moved[rank] = time.monotonic()
                    late = self._begun
                    self._changed.notify_all()
                    if not late:
                        return rank
            if self._channels.get(rank) is channel:
                self._say(
                    channel,
                    self._beginning("", "the others began without this rank, which came late"),
                )
                return rank
            text = f"rank {rank} is here already"
        self._say(channel, {"kind": "refused", "why": text})
        return 0

    def _hear(self, rank: int, message: Message) -> None:
        with self._changed:
            if message.get("kind") == "done":
                self._moved.pop(rank, None)
            elif message.get("kind") == "moved" and rank in self._moved:
                self._moved[rank] = time.monotonic()
            self._changed.notify_all()

    def _beginning(self, launch: str, why: str) -> Message:
        with self._changed:
            known = {str(rank): address for rank, address in self._pull_addresses.items()}
        ring = {"slots": self.terms.slots, "slot_nbytes": self.terms.slot_nbytes}
        return {
            "kind": "begin",
            "launch": launch,
            "why": why[:MAX_WHY],
            "pull_addresses": known,
        } | ring

    def _say(self, channel: Channel, message: Message) -> None:
        try:
            channel.send(message, self._patience.message_seconds)
        except PeerError as error:
            log.info("%s: %s", self.address, error)
