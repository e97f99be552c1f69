"""Who is let into a group, and by whom one lets oneself be invited."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotweights_transports.broadcast.invitation import (
    REMEMBERED,
    Groups,
    Invitation,
    Inviting,
    accept,
)
from hotweights_transports.peers.base import (
    AuthenticationUnavailable,
    Identity,
    Lease,
    PeerClient,
    PeerError,
    PeerMissing,
    PeerProtocolError,
    PeerRefused,
    Pending,
)
from hotweights_transports.peers.registry import transport_for

AGENT = "system:serviceaccount:hotweights:agent"
NODES = {f"token-{node}": Identity(AGENT, node) for node in "abc"}


class Nothing:
    """A node without chunks."""

    def locate(self, blake3: str) -> Lease | Pending | None:
        return None

    def manifest(self, digest: str) -> bytes | None:
        return b"{}" if digest.endswith("0") else None

    def answer(self, name: str, asking: Identity) -> bytes | None:
        return None


class Says(Nothing):
    """Invites everybody with the same words."""

    def __init__(self, text: bytes) -> None:
        self.text = text

    def answer(self, name: str, asking: Identity) -> bytes | None:
        return self.text


@pytest.fixture
def groups() -> Groups:
    return Groups(lambda: "token-a")


@pytest.fixture
def guest(groups: Groups) -> Iterator[PeerClient]:
    """Node b, connected with node a."""
    uri = "inproc://head"
    with (
        transport_for(uri).listen(uri, Inviting(Nothing(), groups), NODES.get),
        transport_for(uri).connect(uri, lambda: "token-b") as client,
    ):
        yield client


def test_a_guest_gets_what_it_needs(groups: Groups, guest: PeerClient) -> None:
    secret = Groups.new_secret()
    groups.open("ours", ["a", "b"], 7000, secret)
    assert accept(guest, "ours", "a", NODES.get) == Invitation(7000, secret)
    assert secret.hex() not in repr(accept(guest, "ours", "a", NODES.get))


def test_before_it_is_open_nobody_is_invited_and_afterwards_everybody_hears_why(
    groups: Groups, guest: PeerClient
) -> None:
    with pytest.raises(PeerMissing, match="has no answer to ours"):
        accept(guest, "ours", "a", NODES.get)
    groups.open("ours", ["a", "b"], 7000, Groups.new_secret())
    groups.close("ours")
    assert accept(guest, "ours", "a", NODES.get).over
    groups.open("ours", ["a", "b"], 7001, Groups.new_secret())
    assert accept(guest, "ours", "a", NODES.get).port == 7001, (
        "a head that tries again invites again"
    )


def test_who_is_no_member_is_not_invited(groups: Groups, guest: PeerClient) -> None:
    groups.open("ours", ["a", "c"], 7000, Groups.new_secret())
    with pytest.raises(PeerMissing):
        accept(guest, "ours", "a", NODES.get)


def test_only_the_head_may_invite(groups: Groups, guest: PeerClient) -> None:
    groups.open("ours", ["a", "b", "c"], 7000, Groups.new_secret())
    with pytest.raises(PeerRefused, match="must be the agent of c, and is a"):
        accept(guest, "ours", "c", NODES.get)
    with pytest.raises(PeerRefused, match="is nobody that we know"):
        accept(guest, "ours", "a", lambda _token: None)


def test_a_token_that_cannot_be_reviewed_is_none(groups: Groups, guest: PeerClient) -> None:
    def away(_token: str) -> Identity | None:
        raise AuthenticationUnavailable("the API server is away")

    groups.open("ours", ["a", "b"], 7000, Groups.new_secret())
    with pytest.raises(PeerRefused, match="the API server is away"):
        accept(guest, "ours", "a", away)


def test_what_is_over_is_forgotten_at_last(groups: Groups) -> None:
    for number in range(REMEMBERED + 1):
        groups.close(str(number))
    assert groups.invitation("0", NODES["token-b"]) is None
    assert groups.invitation("1", NODES["token-b"]) is not None


def test_the_chunks_are_still_there(guest: PeerClient) -> None:
    with pytest.raises(PeerError):
        guest.fetch_manifest("sha256:" + "1" * 64)


WORDS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=80)
    | st.just("token-a")
    | st.just("00" * 32),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
)


@settings(max_examples=150)
@given(
    st.binary(max_size=200)
    | st.dictionaries(st.sampled_from(["port", "secret", "token", "over"]), WORDS).map(
        lambda d: json.dumps(d).encode()
    )
)
def test_whatever_a_peer_says_it_is_an_invitation_or_an_error(text: bytes) -> None:
    uri = "inproc://babbler"
    with (
        transport_for(uri).listen(uri, Says(text), NODES.get),
        transport_for(uri).connect(uri, lambda: "token-b") as client,
    ):
        try:
            found = accept(client, "ours", "a", NODES.get)
        except (PeerProtocolError, PeerRefused):
            return
        assert found.over or (1 <= found.port <= 65535 and len(found.secret) >= 32)
