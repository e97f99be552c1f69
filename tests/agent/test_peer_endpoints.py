"""What an agent tells of its transports, measured on real ones."""

from __future__ import annotations

import pytest

from hotweights_agent import peer_endpoints
from hotweights_agent.session.effects import Report
from hotweights_agent.session.messages import Assigned, Now
from hotweights_agent.session.session import AgentInfo, Session
from hotweights_crds.nodeweights import NodeWeightsSpec
from hotweights_transports.peers.registry import Availability, resolution


@pytest.mark.parametrize("seconds", [0.05, 0.0], ids=["quiet", "begins late"])
@pytest.mark.parametrize("scheme", ["tcp", "ucx"])
def test_a_transport_is_measured(scheme: str, seconds: float) -> None:
    assert peer_endpoints.measure(scheme, seconds) > 0


def test_nothing_is_measured_where_there_is_nothing_to_choose() -> None:
    tcp, ucx, mpi = peer_endpoints.describe(
        ["tcp://10.0.0.1:7600"], ports={"tcp": 7600, "ucx": 0}, mpi=False
    )
    assert (mpi.scheme, mpi.endpoint) == ("mpi", "")
    assert (tcp.scheme, tcp.endpoint, tcp.megabytes_per_second) == ("tcp", "tcp://10.0.0.1:7600", 0)
    assert (ucx.scheme, ucx.endpoint, ucx.megabytes_per_second) == ("ucx", "", 0)
    assert "not switched on" in ucx.message


def test_all_are_told_of_with_what_they_reach() -> None:
    assert peer_endpoints.listeners({"tcp": 7600, "ucx": 0}, "10.0.0.1") == ["tcp://0.0.0.0:7600"]
    assert peer_endpoints.listeners({"tcp": 7600, "ucx": 7601}, "10.0.0.1") == [
        "tcp://0.0.0.0:7600",
        "ucx://0.0.0.0:7601",
    ]
    tcp, ucx, mpi = peer_endpoints.describe(
        ["tcp://10.0.0.1:7600", "ucx://10.0.0.1:7601"], ports={"tcp": 7600, "ucx": 7601}, mpi=True
    )
    assert tcp.megabytes_per_second > 0
    assert ucx.megabytes_per_second > 0
    assert "tcp on" in ucx.message
    assert mpi.endpoint == "mpi://10.0.0.1:7600"
    assert mpi.megabytes_per_second > 0
    assert "mpi4py" in mpi.message


def test_peers_come_by_the_family_of_the_pod_s_address() -> None:
    """The pods of an IPv6-only cluster have no other."""
    assert peer_endpoints.listeners({"tcp": 7600, "ucx": 0}, "fd00::7") == ["tcp://[::]:7600"]


def test_where_ucx_does_not_work_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {scheme: found for scheme, found in resolution().items() if scheme != "ucx"}
    no = Availability(False, "ucxx cannot be imported")
    monkeypatch.setattr("hotweights_agent.peer_endpoints.resolution", lambda: {**found, "ucx": no})
    assert peer_endpoints.listeners({"tcp": 7600, "ucx": 7601}, "10.0.0.1") == [
        "tcp://0.0.0.0:7600"
    ]
    assert (
        peer_endpoints.describe(
            ["tcp://10.0.0.1:7600"], ports={"tcp": 7600, "ucx": 7601}, mpi=False
        )[1].message
        == "ucxx cannot be imported"
    )


def test_the_node_object_says_it() -> None:
    endpoints = peer_endpoints.describe(
        ["tcp://10.0.0.1:7600"], ports={"tcp": 7600, "ucx": 0}, mpi=False
    )
    session = Session(AgentInfo("boot", "v", "tcp://10.0.0.1:7600", endpoints))
    (report,) = session.handle(Assigned(NodeWeightsSpec(), 1), Now(0.0, "t"))
    assert isinstance(report, Report)
    assert tuple(report.status.endpoints) == endpoints
