"""etcd, the API server and the controllers, as processes of this machine.

Alone it needs no root and listens on loopback: validation, admission, watches, garbage collection
and service accounts are the real ones, which is what most tests need, and it is ready in a few
seconds. With nodes (`cluster`) it listens on the address of the nodes' bridge instead, and is
otherwise the same. The API server can be stopped and started while everything else keeps running.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import random
import socket
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from localcluster import binaries, credentials, paths
from localcluster.api import Api
from localcluster.credentials import Credentials, User
from localcluster.host import preflight
from localcluster.host.processes import Daemons, Record, this_process
from localcluster.progress import step

ETCD, APISERVER = "etcd", "kube-apiserver"
CONTROLLER_MANAGER, SCHEDULER = "kube-controller-manager", "kube-scheduler"

_LOOPBACK = "127.0.0.1"
_READY_WITHIN_SECONDS = 240.0
_TEMPORARY_PREFIX = "tmp-"
# Below the range from which the kernel takes ports for outgoing connections: there, a client that
# knocks at
# a stopped API server's port can be given that very port, and then talks to itself.
_PORTS = range(20000, 32000)


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the control plane listens, and the service addresses it hands out."""

    address: str
    apiserver_port: int
    etcd_port: int
    etcd_peer_port: int
    service_cidr: str = "10.96.0.0/16"
    pod_cidr: str = ""  # set where there are nodes

    @property
    def url(self) -> str:
        """The API server's."""
        return f"https://{self.address}:{self.apiserver_port}"

    @property
    def etcd_url(self) -> str:
        """Always on loopback: etcd asks nobody who they are."""
        return f"http://{_LOOPBACK}:{self.etcd_port}"

    @property
    def service_address(self) -> str:
        """The ClusterIP of the API server, which is the first of its range."""
        return self.service_cidr.partition("/")[0].rpartition(".")[0] + ".1"

    @property
    def server_names(self) -> tuple[str, ...]:
        """What the API server's certificate must vouch for."""
        service = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost")
        addresses = (self.address, _LOOPBACK, self.service_address)
        return (
            *(f"DNS:{name}" for name in service),
            *(f"IP:{address}" for address in dict.fromkeys(addresses)),
        )


def free_endpoints() -> Endpoints:
    """Loopback, on ports that nobody listens on."""
    apiserver, etcd, etcd_peer = itertools.islice(_free_ports(), 3)
    return Endpoints(_LOOPBACK, apiserver, etcd, etcd_peer)


def _free_ports() -> Iterator[int]:
    """Each this process' own from here on: another one that chooses meanwhile gets others."""
    folder = paths.cache() / "ports"
    folder.mkdir(parents=True, exist_ok=True)
    for port in random.sample(_PORTS, len(_PORTS)):
        claim = os.open(folder / str(port), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        with socket.socket() as probe:
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(claim)
                continue
            if probe.connect_ex((_LOOPBACK, port)) == 0:
                os.close(claim)
                continue
        yield port  # the claim stays open: it ends with this process


class ControlPlane:
    """A control plane in a state folder; as a context manager it starts, and takes everything away
    at the end.

    Without a state folder it takes a temporary one. If its process is killed, the next temporary
    control plane on this machine clears it away.
    """

    def __init__(
        self,
        state: Path | None = None,
        *,
        endpoints: Endpoints | None = None,  # by default loopback and free ports
        controller_manager: bool = True,  # garbage collection, service accounts, namespaces
        scheduler: bool = False,
        apiserver_arguments: Sequence[str] = (),
        controller_manager_arguments: Sequence[str] = (),
    ) -> None:
        self.state = state or Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=paths.clusters()))
        self.daemons = Daemons(self.state)
        self.credentials = Credentials(self.state)
        self.kubeconfig = self.state / "kubeconfig"
        self._controllers = [CONTROLLER_MANAGER] * controller_manager + [SCHEDULER] * scheduler
        self.programs = (ETCD, APISERVER, *self._controllers)
        self._apiserver_arguments = tuple(apiserver_arguments)
        self._controller_manager_arguments = tuple(controller_manager_arguments)
        if state is None:
            paths.write_atomically(self.state / "owner.json", json.dumps(asdict(this_process())))
        self.endpoints = self._remembered(endpoints)

    def __enter__(self) -> ControlPlane:
        try:
            self.start()
        except BaseException:
            self.stop()  # nobody else will; the logs stay
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    @property
    def url(self) -> str:
        """Where the API server answers."""
        return self.endpoints.url

    @property
    def api(self) -> Api:
        """The API server, asked by the cluster's admin."""
        return Api(self.url, self.credentials.authority, self.credentials.token(credentials.ADMIN))

    def start(self) -> None:
        """Start what does not run yet, and wait until the API server and the controllers work."""
        preflight.control_plane()
        programs = binaries.ensure(self.programs)
        with step("starting the control plane"):
            sweep()
            self.credentials.ensure(self.endpoints.server_names)
            admin = self.credentials.token(credentials.ADMIN)
            paths.write_atomically(
                self.kubeconfig, self.credentials.kubeconfig(self.url, admin), 0o600
            )
            self.daemons.start(ETCD, [programs[ETCD], *etcd_arguments(self.state, self.endpoints)])
            self.start_apiserver()
            if CONTROLLER_MANAGER in self._controllers:
                config = self.kubeconfig_of(credentials.CONTROLLER_MANAGER)
                arguments = controller_manager_arguments(self.credentials, config)
                arguments += self._controller_manager_arguments
                self.daemons.start(CONTROLLER_MANAGER, [programs[CONTROLLER_MANAGER], *arguments])
            if SCHEDULER in self._controllers:
                config = self.kubeconfig_of(credentials.SCHEDULER)
                common = ("--leader-elect=false", "--secure-port=0")
                self.daemons.start(
                    SCHEDULER, [programs[SCHEDULER], f"--kubeconfig={config}", *common]
                )
            self._wait_for_controllers()

    def start_apiserver(self) -> None:
        """Start the API server, if it does not run, and wait until it is ready."""
        program = binaries.ensure([APISERVER])[APISERVER]
        arguments = apiserver_arguments(self.credentials, self.endpoints)
        self.daemons.start(APISERVER, [program, *arguments, *self._apiserver_arguments])
        self.daemons.wait_until(
            self.api.ready,
            "The API server is ready",
            needs=[ETCD, APISERVER],
            timeout_seconds=_READY_WITHIN_SECONDS,
        )

    def stop_apiserver(self, *, grace_seconds: float = 0.0) -> None:
        """Stop the API server: at once, as in a crash, unless it is given time to say goodbye."""
        self.daemons.stop(APISERVER, grace_seconds=grace_seconds)

    def stop(self) -> None:
        """Stop every daemon. What etcd stored stays, and `start` goes on from it."""
        self.daemons.stop_all()

    def remove(self) -> None:
        """Stop everything and delete the state folder."""
        self.stop()
        paths.discard(self.state)

    def kubeconfig_of(self, user: User) -> Path:
        """A kubeconfig for one of the static identities."""
        path = self.state / "pki" / f"{user.name.replace(':', '-')}.kubeconfig"
        paths.write_atomically(
            path, self.credentials.kubeconfig(self.url, self.credentials.token(user)), 0o600
        )
        return path

    def service_account_token(
        self,
        namespace: str,
        name: str,
        *,
        audiences: Sequence[str] = (),  # none means the API server itself
        seconds: int = 3600,
        bound_to: dict[str, str] | None = None,  # boundObjectRef: kind, apiVersion, name, uid
    ) -> str:
        """A token that the API server issues for a service account, as a projected volume would
        hold it.
        """
        spec: dict[str, object] = {"audiences": list(audiences), "expirationSeconds": seconds}
        if bound_to is not None:
            spec["boundObjectRef"] = bound_to
        answer = self.api.post(
            f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token", {"spec": spec}
        )
        return str(answer["status"]["token"])

    def kubeconfig_for(self, namespace: str, service_account: str) -> Path:
        """A kubeconfig that acts as a service account, to test what its RBAC allows."""
        path = self.state / f"{namespace}-{service_account}.kubeconfig"
        token = self.service_account_token(namespace, service_account)
        paths.write_atomically(path, self.credentials.kubeconfig(self.url, token), 0o600)
        return path

    def _wait_for_controllers(self) -> None:
        if CONTROLLER_MANAGER not in self._controllers:
            return
        account = "/api/v1/namespaces/default/serviceaccounts/default"
        authority = "/api/v1/namespaces/default/configmaps/kube-root-ca.crt"
        self.daemons.wait_until(
            lambda: self.api.exists(account) and self.api.exists(authority),
            "The controllers work (the default service account exists)",
            needs=self.programs,
            timeout_seconds=_READY_WITHIN_SECONDS,
        )

    def _remembered(self, given: Endpoints | None) -> Endpoints:
        """The endpoints of this state folder: chosen once, so that kubeconfigs stay true over
        restarts.
        """
        file = self.state / "endpoints.json"
        if given is None and file.exists():
            return Endpoints(**json.loads(file.read_text()))
        endpoints = given or free_endpoints()
        paths.write_atomically(file, json.dumps(asdict(endpoints)))
        return endpoints


def etcd_arguments(state: Path, endpoints: Endpoints) -> list[str]:
    """Without fsync: what a test stores need not survive the machine."""
    peer_url = f"http://{_LOOPBACK}:{endpoints.etcd_peer_port}"
    return [
        f"--data-dir={state / 'etcd'}",
        f"--listen-client-urls={endpoints.etcd_url}",
        f"--advertise-client-urls={endpoints.etcd_url}",
        f"--listen-peer-urls={peer_url}",
        f"--initial-advertise-peer-urls={peer_url}",
        f"--initial-cluster=default={peer_url}",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def apiserver_arguments(keys: Credentials, endpoints: Endpoints) -> list[str]:
    """Authorizers and admission as in a production cluster. Both policy kinds and PodSecurity are
    on by default.
    """
    certificate, key = keys.certificate("apiserver")
    kubelet_certificate, kubelet_key = keys.certificate("kubelet-client")
    return [
        f"--etcd-servers={endpoints.etcd_url}",
        f"--bind-address={endpoints.address}",
        f"--advertise-address={endpoints.address}",
        f"--secure-port={endpoints.apiserver_port}",
        f"--tls-cert-file={certificate}",
        f"--tls-private-key-file={key}",
        f"--client-ca-file={keys.authority}",
        f"--kubelet-client-certificate={kubelet_certificate}",
        f"--kubelet-client-key={kubelet_key}",
        "--kubelet-preferred-address-types=InternalIP",
        f"--service-cluster-ip-range={endpoints.service_cidr}",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-signing-key-file={keys.service_account_key}",
        f"--service-account-key-file={keys.service_account_public_key}",
        f"--token-auth-file={keys.tokens}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        # With nodes, the `kubernetes` Service must lead somewhere; on loopback it cannot.
        f"--endpoint-reconciler-type={'lease' if endpoints.pod_cidr else 'none'}",
        "--allow-privileged=true",
        "--profiling=false",
    ]


def controller_manager_arguments(keys: Credentials, kubeconfig: Path) -> list[str]:
    """Every controller, each under its own service account; node addresses are handed out by us."""
    return [
        f"--kubeconfig={kubeconfig}",
        f"--service-account-private-key-file={keys.service_account_key}",
        f"--root-ca-file={keys.authority}",
        "--use-service-account-credentials",
        "--leader-elect=false",
        "--secure-port=0",
        "--controllers=*,-node-ipam-controller",
    ]


def sweep() -> None:
    """Clear away the temporary control planes whose owners have died."""
    for folder in paths.clusters().glob(f"{_TEMPORARY_PREFIX}*"):
        owner = folder / "owner.json"
        try:
            record = Record(**json.loads(owner.read_text()))
        except FileNotFoundError:
            continue  # just being made
        if not record.alive():
            Daemons(folder).stop_all()
            paths.discard(folder)
