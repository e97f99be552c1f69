"""Settings: what is misspelt does not start; and what is installed from them."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from hotweights_agent import node
from hotweights_agent.local import plugin_folder
from hotweights_agent.metrics import Metrics
from hotweights_agent.session.messages import FrameReceived, StageFailed
from hotweights_agent.settings import RootSettings, SettingsError, read
from hotweights_agent.staging import allowed_sources
from hotweights_agent.staging.store import Store
from hotweights_common.http_endpoints import MAX_CONNECTIONS, Endpoints
from hotweights_storage.errors import SourceRefused
from hotweights_transports.handoff import frames

NODE = {"NODE_NAME": "node-a"}
SECONDS = 40.0  # for an answer of this process or another, while the machine is busy


def config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_the_environment_goes_before_the_file(tmp_path: Path) -> None:
    text = "peer_port: 1\nroots: [{path: /m, namespaces: [a, b]}]\nstaging: {at_once: 3}\n"
    found = read(
        {**NODE, "HOTWEIGHTS_PEER_PORT": "2", "POD_IP": "10.0.0.1"}, config(tmp_path, text)
    )
    assert (found.peer_port, found.address, found.staging.at_once) == (2, "10.0.0.1", 3)
    assert found.roots == (RootSettings(Path("/m"), namespaces=("a", "b")),)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("peer_prot: 1", "peer_prot: no such setting"),
        ("roots: [{path: /m, namespace: a}]", r"roots\[0\].namespace: no such setting"),
        ("roots: [{namespaces: []}]", r"roots\[0\].path: is missing"),
        ("roots: /m", "roots: is a list"),
        ("roots: [{path: /m, namespaces: a}]", r"roots\[0\].namespaces: is a list"),
        ("peer_port: many", "peer_port: takes a int"),
        ("peer_port: true", "peer_port: takes a int"),
        ("peer_port: -1", "peer_port: is not negative"),
        ("staging: 3", "staging.: is a mapping"),
        ("staging: {bandwidth_bytes_per_second: 1000}", "give at least 8388608, or 0"),
        ("log_level: loud", "log_level: 'loud'"),
        ("- a", "is a mapping of settings"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_what_cannot_be_meant_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        read(NODE, config(tmp_path, text))


def test_without_a_node_there_is_no_agent() -> None:
    with pytest.raises(SettingsError, match="NODE_NAME"):
        read({})


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--version"], 0), (["--check"], 2)])
def test_the_command(words: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hotweights_agent", *words],
        capture_output=True,
        text=True,
        env={},
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert ("NODE_NAME" in done.stderr) == (code == 2)


def test_a_claim_is_open_to_the_namespaces_named(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    sources = allowed_sources.allowed([RootSettings(tmp_path, claim="weights", namespaces=("a",))])
    sources.open("pvc://weights/v1", "a").close()
    with pytest.raises(SourceRefused):
        sources.open("pvc://weights/v1", "b")
    with pytest.raises(SourceRefused):
        sources.open(f"file://{tmp_path}/v1", "a")
    allowed_sources.allowed([RootSettings(tmp_path, claim="weights", namespaces=("*",))]).open(
        "pvc://weights/v1", "b"
    ).close()


def test_the_plugin_is_installed_whole_and_once(tmp_path: Path) -> None:
    built, run = tmp_path / "built", tmp_path / "run"
    (built / "hotweights").mkdir(parents=True)
    (built / "hotweights" / "a.py").write_text("1")
    run.mkdir()
    place = plugin_folder.install(built, run, "0.1.0")
    assert place == run / "plugin" / "0.1.0"
    inode = place.stat().st_ino
    assert plugin_folder.install(built, run, "0.1.0") == place
    assert place.stat().st_ino == inode
    (built / "hotweights" / "a.py").write_text("2")
    plugin_folder.install(built, run, "0.1.0")
    plugin_folder.install(built, run, "0.2.0")
    assert [
        (place / "hotweights" / "a.py").read_text(),
        sorted(p.name for p in place.parent.iterdir()),
    ] == [
        "2",
        ["0.1.0", "0.2.0"],
    ]
    assert plugin_folder.install(tmp_path / "none", run, "1") is None
    (tmp_path / "file").write_text("")
    with pytest.raises(plugin_folder.PluginNotInstalled, match="run_folder"):
        plugin_folder.install(built, tmp_path / "file", "1")


def test_versions_take_no_more_than_the_settings_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "available_nbytes", lambda: 1000 * 2**20)
    budget = node.Budget(100 * 2**20)
    budget.store = Store(available=budget)
    assert budget() == budget.store.usage().free == 100 * 2**20
    unbounded = node.Budget(0)
    unbounded.store = budget.store
    assert unbounded() == 1000 * 2**20


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_probes_are_answered_over_both_families(host: str) -> None:
    """In an IPv6-only cluster the kubelet asks over IPv6, and ends who does not answer."""
    endpoints = Endpoints(0, Metrics().registry, lambda: "", lambda: "")
    try:
        url = f"http://{host}:{endpoints.port}/healthz"
        assert urllib.request.urlopen(url, timeout=SECONDS).status == 200
    finally:
        endpoints.close()


def test_metrics_and_probes() -> None:
    metrics = Metrics()
    metrics.note(FrameReceived(1, frames.Committed(1, "d", 1, pause_seconds=0.05)))
    metrics.note(StageFailed("d", "ChecksumMismatch", "", transient=False))
    metrics.note(StageFailed("d", "Whatever" * 9, "", transient=False))
    wrong = ["stuck"]
    endpoints = Endpoints(0, metrics.registry, lambda: "", lambda: wrong[0])
    url = f"http://127.0.0.1:{endpoints.port}"
    try:
        text = urllib.request.urlopen(f"{url}/metrics", timeout=SECONDS).read().decode()
        assert 'hotweights_agent_commits_total{result="Committed"} 1.0' in text
        assert "hotweights_agent_checksum_failures_total 1.0" in text
        assert 'reason="Other"' in text
        assert urllib.request.urlopen(f"{url}/healthz", timeout=SECONDS).status == 200
        with pytest.raises(urllib.error.HTTPError, match="503") as caught:
            urllib.request.urlopen(f"{url}/readyz", timeout=SECONDS)
        assert caught.value.read() == b"stuck\n"
        caught.value.close()
    finally:
        endpoints.close()


@pytest.mark.timeout(120)  # hundreds of threads begin and end
def test_connections_that_ask_nothing_give_way_to_the_kubelet() -> None:
    endpoints = Endpoints(0, Metrics().registry, lambda: "", lambda: "")
    before = threading.active_count()
    silent = [
        socket.create_connection(("127.0.0.1", endpoints.port)) for _ in range(3 * MAX_CONNECTIONS)
    ]
    try:
        url = f"http://127.0.0.1:{endpoints.port}/healthz"
        assert urllib.request.urlopen(url, timeout=SECONDS).status == 200
        deadline = time.monotonic() + SECONDS
        while threading.active_count() > before + MAX_CONNECTIONS and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() <= before + MAX_CONNECTIONS
    finally:
        for sock in silent:
            sock.close()
        endpoints.close()
