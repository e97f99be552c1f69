"""A connection whose words go over a socket and whose chunks go over UCX.

The socket is that of the TCP transport, with all it promises: the token is reviewed before UCX
hears of a stranger, every refusal and every sign of life is a frame on it, and its end is the end
of both. After the welcome, the two sides tell each other where their UCX workers are, and the
server's first message proves the road before anything is asked for. From then on the payload of a
chunk comes as messages of a size that was agreed on, the last one being what is left.
"""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import struct
from typing import Final

from hotweights_transports.peers import frames
from hotweights_transports.peers.stream.timed_socket import ConnectionBroken, Tick, Unusable, Wire
from hotweights_transports.peers.ucx.channel import Channel

MESSAGE_NBYTES: Final = 4 * 1024 * 1024
"""At most: a peer at the slowest bearable rate completes one before it counts as silent, for bytes
are heard of per message.
"""
PROOF: Final = struct.Struct("!Q")  # the tag again
# the tag of all messages, the size of each; then the worker's address
GREETING: Final = struct.Struct("!QI")


class UcxWire(Wire):
    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._channel: Channel | None = None
        self._message_nbytes = MESSAGE_NBYTES
        self._buffer = bytearray()

    def prepare_to_pull(self, tick: Tick) -> None:
        tag = secrets.randbits(64)  # not to be guessed: it tells this pair's messages from others'
        channel = self._open(tag)
        self._say(tag, channel, tick)
        header = frames.decode_header(self.receive(frames.HEADER.size, tick), frames.TO_GREETED)
        payload = bytes(self.receive(header.nbytes, tick))
        if header.kind is frames.Kind.REFUSED:
            raise Unusable(frames.read_refused(payload).message)
        echo, self._message_nbytes, address = _read(payload)
        if echo != tag:
            raise frames.FrameError("a greeting that answers another one")
        channel.connect(address)
        proof = bytearray(PROOF.size)
        channel.receive_into(memoryview(proof), tick)
        if PROOF.unpack(proof) != (tag,):
            raise frames.FrameError("the first message over UCX proves nothing")

    def prepare_to_serve(self, piece_nbytes: int | None, tick: Tick) -> None:
        self._message_nbytes = min(piece_nbytes or MESSAGE_NBYTES, MESSAGE_NBYTES)
        header = frames.decode_header(self.receive(frames.HEADER.size, tick), frames.GREETINGS)
        # the puller's size is not asked: the side that sends says how large its messages are
        tag, _, address = _read(bytes(self.receive(header.nbytes, tick)))
        channel = self._open(tag)
        try:
            channel.connect(address)
        except ConnectionBroken as error:
            raise Unusable(str(error)) from error
        self._say(tag, channel, tick)
        channel.send(memoryview(PROOF.pack(tag)), tick)

    def send(self, data: bytes | memoryview, tick: Tick, *, more: bool = False) -> None:
        # what follows a chunk's header is not on this socket: it must not wait for more
        super().send(data, tick)

    def send_file(self, fd: int, offset: int, nbytes: int, tick: Tick) -> None:
        """Straight from the pages, which nothing can change any more."""
        for begin in range(offset, offset + nbytes, self._message_nbytes):
            size = min(self._message_nbytes, offset + nbytes - begin)
            aligned = begin - begin % mmap.ALLOCATIONGRANULARITY
            # all pages at once (mmap(2)), instead of a fault for each while UCX reads them
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            with (
                mmap.mmap(
                    fd, begin - aligned + size, flags=flags, prot=mmap.PROT_READ, offset=aligned
                ) as mapped,
                memoryview(mapped) as whole,
                whole[begin - aligned :] as message,
            ):
                self._send_message(message, tick)

    def send_copy(self, fd: int, offset: int, nbytes: int, tick: Tick) -> None:
        """By way of memory of our own: UCX may keep the pages of a message pinned, and pinned pages
        cannot be sealed.
        """
        for begin in range(offset, offset + nbytes, self._message_nbytes):
            size = min(self._message_nbytes, offset + nbytes - begin)
            if size > len(self._buffer):
                self._buffer = bytearray(self._message_nbytes)
            with memoryview(self._buffer) as whole, whole[:size] as message:
                if os.preadv(fd, [message], begin) != size:
                    raise ConnectionBroken(f"the file ended before byte {begin + size}")
                self._send_message(message, tick)

    def receive_chunk(self, view: memoryview, tick: Tick) -> None:
        for begin in range(0, len(view), self._message_nbytes):
            self._require().receive_into(view[begin : begin + self._message_nbytes], tick)

    def close(self) -> None:
        self.hang_up()  # first: then the other end lets go of the channel too
        if self._channel is not None:
            self._channel.close()
        super().close()

    def _send_message(self, message: memoryview, tick: Tick) -> None:
        self._require().send(message, tick)

    def _open(self, tag: int) -> Channel:
        self._channel = Channel(self.fileno(), tag)
        return self._channel

    def _require(self) -> Channel:
        if self._channel is None:
            raise ConnectionBroken("chunks before the two sides found each other over UCX")
        return self._channel

    def _say(self, tag: int, channel: Channel, tick: Tick) -> None:
        payload = GREETING.pack(tag, self._message_nbytes) + channel.address
        self.send(frames.Header(frames.Kind.GREETING, len(payload)).encode() + payload, tick)


def _read(payload: bytes) -> tuple[int, int, bytes]:
    """Tag, largest size of a message, and address of the worker, out of a greeting."""
    if len(payload) <= GREETING.size:
        raise frames.FrameError("a greeting without an address")
    tag, message_nbytes = GREETING.unpack_from(payload)
    if not 1 <= message_nbytes <= MESSAGE_NBYTES:
        raise frames.FrameError(f"messages of {message_nbytes} bytes; at most {MESSAGE_NBYTES}")
    return tag, message_nbytes, payload[GREETING.size :]
