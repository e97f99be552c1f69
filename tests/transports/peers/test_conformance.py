"""What every peer transport promises, tried over each of them (see
`hotweights_transports.peers.base`).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hotweights_transports.peers.base import (
    ClientLimits,
    PeerClient,
    PeerCorrupt,
    PeerError,
    PeerMissing,
    PeerRefused,
    PeerServer,
    PeerTimeout,
    PeerUnreachable,
    ServerLimits,
    Want,
)

Node = Any  # conftest's; a conftest is no module to import from
NewNode = Callable[[], Node]
Serve = Callable[..., PeerServer]
Connect = Callable[..., PeerClient]

ABSENT = Want("0" * 64, 100)


@pytest.fixture
def parent(new_node: NewNode) -> Node:
    return new_node()


@pytest.fixture
def child(new_node: NewNode) -> Node:
    return new_node()


@pytest.fixture
def digest(parent: Node) -> str:
    return str(next(iter(parent.manifests)))


def test_chunks_arrive_verified_and_in_order(
    parent: Node, child: Node, digest: str, serve: Serve, connect: Connect
) -> None:
    wants = [*parent.fill(200), parent.add(b""), parent.add(bytes(3_000_000))]
    order: list[Want] = []

    def deliver(want: Want, data: memoryview) -> None:
        child.deliver(want, data)
        order.append(want)

    client = connect(serve(parent).address, ClientLimits(streams=1, window_chunks=7))
    assert client.fetch_chunks(digest, wants, deliver) == []
    assert order == wants
    assert all(child.holds(want) for want in wants)
    assert parent.has_all_leases_back()


def test_several_streams_share_the_work(
    parent: Node, child: Node, digest: str, serve: Serve, connect: Connect
) -> None:
    wants = parent.fill(300)
    client = connect(serve(parent).address, ClientLimits(streams=4, window_chunks=8))
    assert client.fetch_chunks(digest, iter(wants), child.deliver) == []
    assert all(child.holds(want) for want in wants)


def test_a_client_can_be_used_again(
    parent: Node, child: Node, digest: str, serve: Serve, connect: Connect
) -> None:
    client = connect(serve(parent).address)
    for seed in range(3):
        wants = parent.fill(10, seed=seed)
        assert client.fetch_chunks(digest, wants, child.deliver) == []
        assert all(child.holds(want) for want in wants)


def test_manifest(parent: Node, digest: str, serve: Serve, connect: Connect) -> None:
    client = connect(serve(parent).address)
    assert client.fetch_manifest(digest) == parent.manifests[digest]
    with pytest.raises(PeerMissing, match="does not know the version"):
        client.fetch_manifest("sha256:" + "0" * 64)
    assert client.fetch_manifest(digest) == parent.manifests[digest]


def test_an_answer_to_a_question(parent: Node, digest: str, serve: Serve, connect: Connect) -> None:
    client = connect(serve(parent).address)
    with pytest.raises(PeerMissing, match="has no answer to ours"):
        client.ask("ours")
    parent.answers["ours"] = b"come"
    assert client.ask("ours") == b"come"
    assert parent.guests[-1].name == "system:serviceaccount:hotweights:agent"
    assert client.fetch_manifest(digest) == parent.manifests[digest], "the connection goes on"


def test_a_manifest_that_is_another_is_not_taken(
    parent: Node, serve: Serve, connect: Connect
) -> None:
    digest = "sha256:" + "1" * 64
    parent.manifests[digest] = b"something else"
    with pytest.raises(PeerCorrupt) as caught:
        connect(serve(parent).address).fetch_manifest(digest)
    assert caught.value.reason == "ChecksumMismatch"


def test_missing_chunks_are_named_and_the_others_come(
    parent: Node, child: Node, digest: str, serve: Serve, connect: Connect
) -> None:
    wants = parent.fill(3)
    missing = connect(serve(parent).address).fetch_chunks(
        digest, [wants[0], ABSENT, *wants[1:]], child.deliver
    )
    assert [(gap.want, gap.version_known) for gap in missing] == [(ABSENT, True)]
    assert all(child.holds(want) for want in wants)


def test_missing_tells_whether_the_version_is_known_at_all(
    parent: Node, child: Node, serve: Serve, connect: Connect
) -> None:
    have = parent.fill(1)
    missing = connect(serve(parent).address).fetch_chunks(
        "sha256:" + "0" * 64, [*have, ABSENT], child.deliver
    )
    assert [(gap.want, gap.version_known) for gap in missing] == [(ABSENT, False)]
    assert child.holds(have[0])


def test_a_pending_chunk_is_sent_as_soon_as_it_is_there(
    parent: Node, child: Node, digest: str, serve: Serve, connect: Connect
) -> None:
    first, late = b"first", b"late"
    wants = [parent.add(first), child.add(late)]
    parent.pending.add(wants[1].blake3)
    got: list[str] = []

    def deliver(want: Want, _data: memoryview) -> None:
        got.append(want.blake3)
        if want == wants[0]:
            threading.Timer(0.15, parent.add, [late]).start()

    client = connect(serve(parent).address, ClientLimits(streams=1))
    assert client.fetch_chunks(digest, wants, deliver) == []
    assert got == [want.blake3 for want in wants]


def test_a_pending_chunk_that_never_comes_is_missing(
    parent: Node, child: Node, digest: str, serve: Serve, connect: Connect
) -> None:
    parent.pending.add(ABSENT.blake3)
    threading.Timer(0.1, parent.give_up, [ABSENT.blake3]).start()
    missing = connect(serve(parent).address).fetch_chunks(digest, [ABSENT], child.deliver)
    assert [gap.want for gap in missing] == [ABSENT]


def test_a_peer_that_lives_but_stalls_is_given_up(
    parent: Node, child: Node, digest: str, serve: Serve, connect: Connect
) -> None:
    parent.pending.add(ABSENT.blake3)
    wants = [*parent.fill(2), ABSENT]
    client = connect(serve(parent).address, ClientLimits(stall_seconds=0.3))
    while True:
        began = time.monotonic()
        with pytest.raises(PeerTimeout, match=r"completed no chunk for 0\.3 s"):
            client.fetch_chunks(digest, wants, child.deliver)
        assert time.monotonic() - began < 30.0  # the limits that were not set are longer
        if all(child.holds(want) for want in wants[:2]):
            return  # else the machine kept us waiting for longer than that before they came


@pytest.mark.parametrize("token", ["", "bad", "x" * 5000])
def test_a_stranger_gets_no_byte_and_a_reason(
    parent: Node, child: Node, digest: str, serve: Serve, connect: Connect, token: str
) -> None:
    wants = parent.fill(1)
    client = connect(serve(parent).address, token=token)
    with pytest.raises(PeerRefused, match="TokenInvalid"):
        client.fetch_chunks(digest, wants, child.deliver)
    with pytest.raises(PeerRefused, match="TokenInvalid"):
        client.fetch_manifest(digest)
    assert not child.holds(wants[0])
    assert parent.located == []


def test_a_flipped_bit_is_noticed(
    parent: Node, child: Node, digest: str, serve: Serve, connect: Connect
) -> None:
    bad = parent.add(b"evil", blake3_hex=child.add(b"good").blake3)
    wants = [*parent.fill(3), bad]
    got: list[Want] = []

    def deliver(want: Want, data: memoryview) -> None:
        child.deliver(want, data)
        got.append(want)

    with pytest.raises(PeerCorrupt) as caught:
        connect(serve(parent).address, ClientLimits(streams=1)).fetch_chunks(digest, wants, deliver)
    assert caught.value.reason == "ChecksumMismatch"
    assert got == wants[:3]
    assert parent.has_all_leases_back()


def test_a_chunk_of_another_size_is_no_answer(
    parent: Node, child: Node, digest: str, serve: Serve, connect: Connect
) -> None:
    [want] = parent.fill(1)
    with pytest.raises(PeerError, match="bytes for"):
        connect(serve(parent).address).fetch_chunks(
            digest, [Want(want.blake3, want.nbytes - 1)], child.deliver
        )


def test_what_deliver_raises_passes_through(
    parent: Node, digest: str, serve: Serve, connect: Connect
) -> None:
    class FullError(Exception):
        pass

    def deliver(_want: Want, _data: memoryview) -> None:
        raise FullError

    client = connect(serve(parent).address)
    with pytest.raises(FullError):
        client.fetch_chunks(digest, parent.fill(20), deliver)
    assert client.fetch_manifest(digest)


def test_a_peer_that_dies_in_the_middle(
    parent: Node, child: Node, digest: str, serve: Serve, connect: Connect
) -> None:
    wants = parent.fill(40)
    server = serve(parent)
    closer, once = threading.Thread(target=server.close), threading.Lock()
    got: list[Want] = []

    def deliver(want: Want, data: memoryview) -> None:
        if not child.holds(want):
            child.deliver(want, data)
        got.append(want)
        if want == wants[10] and once.acquire(blocking=False):
            closer.start()

    client = connect(server.address, ClientLimits(window_chunks=16))
    with pytest.raises(PeerUnreachable):  # whenever that is: there is no end of what is wanted
        client.fetch_chunks(digest, itertools.cycle(wants), deliver)
    closer.join()
    delivered = len(got)
    assert delivered > 10
    assert all(child.holds(want) for want in got)
    time.sleep(0.05)
    assert len(got) == delivered


def test_nobody_listens(serve: Serve, parent: Node, digest: str, connect: Connect) -> None:
    server = serve(parent)
    server.close()
    with pytest.raises(PeerUnreachable):
        connect(server.address).fetch_manifest(digest)


def test_cancel_returns_early(
    parent: Node, child: Node, digest: str, serve: Serve, connect: Connect
) -> None:
    cancel = threading.Event()
    parent.pending.add(ABSENT.blake3)
    threading.Timer(0.1, cancel.set).start()
    began = time.monotonic()
    client = connect(serve(parent).address)
    assert (
        client.fetch_chunks(digest, [*parent.fill(2), ABSENT], child.deliver, cancel=cancel) == []
    )
    assert time.monotonic() - began < 30.0  # the limits are longer


def test_wanted_is_taken_as_the_window_opens(
    parent: Node, child: Node, digest: str, serve: Serve, connect: Connect
) -> None:
    wants = parent.fill(50)
    done = 0
    furthest = 0

    def feed() -> Iterator[Want]:
        nonlocal furthest
        for number, want in enumerate(wants):
            furthest = max(furthest, number - done)
            yield want

    def deliver(want: Want, data: memoryview) -> None:
        nonlocal done
        child.deliver(want, data)
        done += 1

    connect(serve(parent).address, ClientLimits(streams=1, window_chunks=6)).fetch_chunks(
        digest, feed(), deliver
    )
    assert done == 50
    assert furthest <= 6


def test_one_connection_too_many_is_refused(
    parent: Node, child: Node, digest: str, serve: Serve, connect: Connect
) -> None:
    server = serve(parent, ServerLimits(max_connections=1, waiting_seconds=0.05))
    parent.pending.add(ABSENT.blake3)
    cancel = threading.Event()
    first = connect(server.address, ClientLimits(streams=1))
    busy = threading.Thread(
        target=first.fetch_chunks, args=(digest, [ABSENT], child.deliver), kwargs={"cancel": cancel}
    )
    busy.start()
    while not parent.located:
        time.sleep(0.005)
    with pytest.raises(PeerRefused, match="Busy"):
        connect(server.address).fetch_manifest(digest)
    cancel.set()
    busy.join()


def test_bandwidth_is_limited(
    parent: Node, child: Node, digest: str, serve: Serve, connect: Connect
) -> None:
    wants = parent.fill(8, nbytes=50_000)
    server = serve(parent, ServerLimits(bandwidth_bytes_per_second=1_000_000))
    began = time.monotonic()
    connect(server.address).fetch_chunks(digest, wants, child.deliver)
    assert 0.2 < time.monotonic() - began < 30.0
    assert all(child.holds(want) for want in wants)


def test_a_chain_pipelines(new_node: NewNode, serve: Serve, connect: Connect) -> None:
    """Four nodes in a row: the last one has each chunk before the first one has the next."""
    head, *others = nodes = [new_node() for _ in range(4)]
    digest, source = next(iter(head.manifests)), new_node()
    contents = [bytes([number]) * 100_000 for number in range(20)]
    wants = [source.add(content) for content in contents]
    for node in nodes:
        node.pending.update(want.blake3 for want in wants)
    servers = [serve(node) for node in nodes]
    order: list[tuple[int, Want]] = []

    def pull(number: int) -> None:
        def deliver(want: Want, data: memoryview) -> None:
            order.append((number, want))
            others[number].deliver(want, data)
            if others[number] is others[-1] and len(contents) > 1:
                del contents[0]
                head.add(contents[0])

        client = connect(servers[number].address, ClientLimits(streams=1))
        assert client.fetch_chunks(digest, wants, deliver) == []

    threads = [threading.Thread(target=pull, args=(number,)) for number in range(3)]
    for thread in reversed(threads):  # children ask before their parents have anything
        thread.start()
    head.add(contents[0])
    for thread in threads:
        thread.join()
    assert order == [(number, want) for want in wants for number in range(3)]
    assert all(node.holds(want) for node in others for want in wants)
