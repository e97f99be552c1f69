"""A transport between nodes, and a kind of source that agents read, are each one new module and
nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotweights_agent import peer_endpoints
from hotweights_agent.settings import RootSettings
from hotweights_agent.staging import allowed_sources
from hotweights_crds.nodeweights import Endpoint, NodeWeightsSpec, NodeWeightsStatus
from hotweights_operator.decide import transports as decisions
from hotweights_operator.model.objects import NodeState
from hotweights_storage import sources
from hotweights_transports import peers
from hotweights_transports.peers.registry import resolution, transport_for, transports

TRANSPORT = """
from hotweights_transports.peers.tcp import TcpTransport

class Pigeons(TcpTransport):
    scheme = "pigeon"

TRANSPORT = Pigeons()
"""
SOURCE = """
from hotweights_storage.sources.file import FileOpener

class Opener:
    def __init__(self, roots):
        self._files = FileOpener(roots)

    def open(self, uri, namespace):
        return self._files.open(uri.replace("punched-cards://", "file://", 1), namespace)

OPENERS = {"punched-cards": Opener}
"""


@pytest.fixture
def pigeons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "pigeons.py").write_text(TRANSPORT)
    monkeypatch.setattr(peers, "__path__", [*peers.__path__, str(tmp_path)])
    transports.cache_clear()
    yield
    sys.modules.pop("hotweights_transports.peers.pigeons", None)
    transports.cache_clear()


def node(name: str, *endpoints: Endpoint) -> NodeState:
    status = NodeWeightsStatus(endpoint=f"tcp://{name}:1", endpoints=list(endpoints))
    return NodeState(name, 1, "1", NodeWeightsSpec(), status)


@pytest.mark.usefixtures("pigeons")
def test_a_transport_is_one_new_module() -> None:
    assert transport_for("pigeon://a:1").scheme == "pigeon"
    assert resolution()["pigeon"].works
    ports = {"tcp": 1, "ucx": 0, "pigeon": 7}
    assert peer_endpoints.listeners(ports, "10.0.0.1") == ["tcp://0.0.0.0:1", "pigeon://0.0.0.0:7"]
    told = peer_endpoints.describe(["tcp://10.0.0.1:1"], ports, mpi=False)
    assert {one.scheme for one in told} == {"tcp", "ucx", "mpi", "pigeon"}
    tcp = Endpoint(scheme="tcp", endpoint="tcp://a:1", megabytes_per_second=10)
    quick = Endpoint(scheme="pigeon", endpoint="pigeon://a:7", megabytes_per_second=20)
    child, parent = node("b", tcp, quick), node("a", tcp, quick)
    assert decisions.choose("Auto", child, parent) == "pigeon://a:7"
    assert decisions.choose("TCP", child, parent) == "tcp://a:1"


def test_a_kind_of_source_is_one_new_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "punched_cards.py").write_text(SOURCE)
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path)])
    allowed = allowed_sources.allowed([RootSettings(tmp_path, namespaces=("*",))])
    with allowed.open(f"punched-cards://{tmp_path}", "ns") as opened:
        assert "punched_cards.py" in opened.files()
    sys.modules.pop("hotweights_storage.sources.punched_cards", None)
