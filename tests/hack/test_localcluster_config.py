"""What the cluster's daemons are told: keys, tokens, addresses and configuration files."""

from __future__ import annotations

import base64
import ipaddress
import itertools
import json
import time
import tomllib
from pathlib import Path

import pytest

from localcluster import binaries, credentials, nodeconfig, paths
from localcluster.controlplane import Endpoints, apiserver_arguments
from localcluster.credentials import Credentials, User
from localcluster.errors import ClusterError
from localcluster.host import cgroups, hostsetup, mounts
from localcluster.host.slots import Slot

SLOT = Slot(3, "test")


def test_every_binary_has_a_pinned_version() -> None:
    assert {binaries.version_of(binary) for binary in binaries.BINARIES.values()} >= {
        "v1.36.3",
        "v3.6.8",
        "v2.2.0",
    }


def test_a_key_changes_with_the_pins_and_the_flags(tmp_path: Path) -> None:
    for file in ("go.mod", "go.sum"):
        source = paths.HACK / "modules" / "containerd" / file
        (tmp_path / "containerd").mkdir(exist_ok=True)
        (tmp_path / "containerd" / file).write_text(source.read_text())
    ctr, shim = binaries.BINARIES["ctr"], binaries.BINARIES["containerd-shim-runc-v2"]
    before = binaries.key_of(ctr, tmp_path)
    assert before == binaries.key_of(ctr)
    assert before != binaries.key_of(shim, tmp_path)
    with (tmp_path / "containerd" / "go.sum").open("a") as file_:
        file_.write("more\n")
    assert before != binaries.key_of(ctr, tmp_path)


def test_an_unknown_binary_is_refused_by_name() -> None:
    with pytest.raises(ClusterError, match="kube-apiserver"):
        binaries.ensure(["docker"])


def test_the_version_is_stamped_where_kubernetes_looks() -> None:
    flags = binaries.BINARIES["kubelet"].ldflags("v1.36.3")
    assert "-X k8s.io/component-base/version.gitVersion=v1.36.3" in flags
    assert "-X k8s.io/component-base/version.gitMinor=36" in flags


def test_tokens_carry_their_groups() -> None:
    rendered = credentials.render_tokens(
        {User("system:node:a", ("system:nodes", "more")): "secret"}
    )
    assert rendered == 'secret,system:node:a,system:node:a,"system:nodes,more"\n'


def test_a_kubeconfig_holds_all_it_needs() -> None:
    config = json.loads(
        credentials.render_kubeconfig("https://127.0.0.1:1", b"authority", "secret")
    )
    assert (
        base64.b64decode(config["clusters"][0]["cluster"]["certificate-authority-data"])
        == b"authority"
    )
    assert config["users"][0]["user"] == {"token": "secret"}


def test_the_certificate_vouches_for_every_way_to_the_server() -> None:
    names = Endpoints("10.200.3.1", 6443, 1, 2, "10.99.0.0/16").server_names
    assert {"IP:10.200.3.1", "IP:127.0.0.1", "IP:10.99.0.1", "DNS:kubernetes.default.svc"} <= set(
        names
    )


@pytest.mark.parametrize(("pod_cidr", "reconciler"), [("", "none"), ("10.213.0.0/16", "lease")])
def test_the_service_leads_to_the_server_only_where_there_are_nodes(
    monkeypatch: pytest.MonkeyPatch, pod_cidr: str, reconciler: str
) -> None:
    monkeypatch.setattr(Credentials, "certificate", lambda *_: (Path("a.crt"), Path("a.key")))
    arguments = apiserver_arguments(
        Credentials(Path("/state")), Endpoints("127.0.0.1", 1, 2, 3, pod_cidr=pod_cidr)
    )
    assert f"--endpoint-reconciler-type={reconciler}" in arguments
    assert "--authorization-mode=Node,RBAC" in arguments


def test_no_two_slots_share_an_address() -> None:
    networks = [network for number in range(16) for network in Slot(number, "x").networks()]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(networks, 2))


def test_a_node_lies_inside_its_slot() -> None:
    nodes, pods, services = SLOT.networks()
    for index in range(credentials.MAX_NODES):
        node = SLOT.node(index)
        assert ipaddress.ip_address(node.address) in nodes
        assert ipaddress.IPv4Network(node.pod_cidr).subnet_of(pods)
        assert ipaddress.ip_address(node.pod_gateway) in ipaddress.ip_network(node.pod_cidr)
        assert len(node.host_link) <= 15
    assert str(services) == SLOT.service_cidr


@pytest.mark.parametrize("name", ["", "Upper", "a/b", "-a", "a-", "a" * 31])
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(ClusterError, match="no name for a cluster"):
        paths.valid_name(name)


def test_a_discarded_folder_is_gone_at_once_and_soon_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOTWEIGHTS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "state"
    (folder / "deep").mkdir(parents=True)
    paths.discard(folder)
    paths.discard(folder)  # a second time is no error
    assert not folder.exists()
    deadline = time.monotonic() + 30
    while any((tmp_path / "cache" / "trash").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any((tmp_path / "cache" / "trash").iterdir())


def test_only_one_holds_a_lock(tmp_path: Path) -> None:
    with (
        paths.locked(tmp_path / "lock", "testing", timeout_seconds=1),
        pytest.raises(ClusterError, match="busy with testing"),
        paths.locked(tmp_path / "lock", "testing", timeout_seconds=0.1),
    ):
        pytest.fail("both hold it")


def test_containerd_is_told_to_leave_oom_scores_alone() -> None:
    config = tomllib.loads(nodeconfig.containerd(Path("/state/cni"), restrict_oom_scores=True))
    runtime = config["plugins"]["io.containerd.cri.v1.runtime"]
    assert runtime["restrict_oom_score_adj"] is True
    assert runtime["cni"]["conf_dir"] == "/state/cni"
    assert (
        config["plugins"]["io.containerd.cri.v1.images"]["pinned_images"]["sandbox"]
        == nodeconfig.PAUSE_IMAGE
    )


@pytest.mark.parametrize(
    ("capabilities", "may"),
    [("000001fffeffffff", False), ("000001ffffffffff", True), ("0000000000000000", False)],
)
def test_the_capability_is_read_from_status(capabilities: str, may: bool) -> None:
    assert nodeconfig.may_lower_oom_scores(f"Name:\tx\nCapEff:\t{capabilities}\n") is may


def test_pods_keep_their_addresses_between_nodes() -> None:
    plugin = json.loads(nodeconfig.cni(SLOT.node(1)))["plugins"][0]
    assert plugin["ipMasq"] is False
    assert plugin["ipam"]["ranges"] == [[{"subnet": "10.213.1.0/24", "gateway": "10.213.1.1"}]]


def test_the_kubelet_asks_who_is_calling() -> None:
    config = json.loads(
        nodeconfig.kubelet(
            "hotweights-test/node-0", Path("/ca.crt"), Path("/resolv.conf"), ["192.0.2.1"]
        )
    )
    assert config["authentication"]["anonymous"] == {"enabled": False}
    assert config["authorization"] == {"mode": "Webhook"}
    assert config["clusterDNS"] == ["192.0.2.1"]
    assert config["cgroupRoot"] == "/hotweights-test/node-0"
    assert "crashLoopBackOff" not in config


def test_a_kubelet_can_be_told_to_restart_soon() -> None:
    config = json.loads(nodeconfig.kubelet("group", Path("/ca.crt"), Path("/resolv.conf"), [], 5))
    assert config["crashLoopBackOff"] == {"maxContainerRestartPeriod": "5s"}


def test_name_servers_on_the_hosts_loopback_are_left_out() -> None:
    host = "# made by hand\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nsearch example.org\n"
    assert nodeconfig.resolv_conf(host) == "nameserver 192.0.2.1\nsearch example.org\n"
    assert nodeconfig.name_servers(nodeconfig.resolv_conf(host)) == ["192.0.2.1"]


def test_mounts_below_a_folder_come_in_their_order() -> None:
    lines = [
        f"{number} 1 0:1 / {point} rw - tmpfs tmpfs rw"
        for number, point in enumerate(["/a", "/a/b", "/ab", "/a/c\\040d"])
    ]
    assert mounts.mounted_below(Path("/a"), "\n".join(lines)) == [
        Path("/a"),
        Path("/a/b"),
        Path("/a/c d"),
    ]


@pytest.mark.parametrize(
    ("targets", "mirror"),
    [
        pytest.param("", hostsetup.DEBIAN_MIRROR, id="nothing"),
        pytest.param(
            "stable bookworm main http://mirror.example/debian/\n",
            "http://mirror.example/debian",
            id="own",
        ),
        pytest.param(
            "noble noble main http://x.example/ubuntu\n",
            hostsetup.DEBIAN_MIRROR,
            id="another-distribution",
        ),
        pytest.param(
            "x bookworm contrib http://x.example/debian\n",
            hostsetup.DEBIAN_MIRROR,
            id="another-component",
        ),
        pytest.param(
            "x bookworm-security main http://x.example/debian-security\n",
            hostsetup.DEBIAN_MIRROR,
            id="security",
        ),
    ],
)
def test_the_mirror_is_the_one_that_apt_uses(targets: str, mirror: str) -> None:
    assert hostsetup.mirror_among(targets) == mirror


def test_builds_get_pips_index_and_not_its_paths() -> None:
    listed = ":env:.default-timeout='180'\nglobal.timeout='15'\nglobal.cert='/own/ca.crt'\nglobal.index-url='https://x.example/simple'\nglobal.find-links='/opt/w'\n"
    config = hostsetup.render_pip_config(listed)
    assert "timeout = 180\n" in config
    assert "index-url = https://x.example/simple\n" in config
    assert f"cert = {hostsetup.CONTAINER_AUTHORITIES}\n" in config
    assert "/opt/w" not in config


def test_an_ordinary_machine_needs_no_pip_config() -> None:
    assert hostsetup.render_pip_config("") == ""


def test_every_node_has_its_own_cores_where_there_are_enough() -> None:
    assert [cgroups.share_of({0, 1, 2, 3}, index, 2) for index in range(2)] == [{0, 2}, {1, 3}]
    assert cgroups.share_of({5}, 1, 2) == {5}


def test_what_a_cgroup_weighs_is_said_in_either_versions_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version, file in (
        ("v1", "cpu.shares"),
        ("v2", "cpu.weight"),
        ("another controller's", "tasks"),
    ):
        folder = tmp_path / version / "c"
        folder.mkdir(parents=True)
        (folder / file).write_text("")
    monkeypatch.setattr(cgroups, "hierarchies", lambda: sorted(tmp_path.iterdir()))
    cgroups.weigh("c", 2 * 8192)
    found = {file.name: file.read_text() for file in tmp_path.rglob("c/*")}
    assert found == {"cpu.shares": "16384", "cpu.weight": "625", "tasks": ""}
