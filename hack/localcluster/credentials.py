"""Who may talk to the cluster: one small authority for certificates, and a bearer token for each
component.

Every component has the identity it has in a real cluster (`system:node:NAME` and so on), so that
the Node authorizer, NodeRestriction and RBAC decide here what they decide there. Tokens come from a
static file, because that needs no certificate per user; certificates are only for serving and for
the API server's way into the kubelets. openssl writes them: the standard library cannot.
"""

from __future__ import annotations

import base64
import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from localcluster import paths
from localcluster.host.commands import run

MAX_NODES = 16
"""How many nodes a cluster can have: their tokens are made at once, as the API server reads the
file once.
"""

_EC_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
_DAYS = "3650"


@dataclass(frozen=True, slots=True)
class User:
    """A static identity."""

    name: str
    groups: tuple[str, ...] = ()


ADMIN = User("hotweights-admin", ("system:masters",))
CONTROLLER_MANAGER = User("system:kube-controller-manager")
SCHEDULER = User("system:kube-scheduler")
PROXY = User("system:kube-proxy")


def node_user(node: str) -> User:
    """The identity of a node's kubelet."""
    return User(f"system:node:{node}", ("system:nodes",))


def node_name(index: int) -> str:
    """The name of the node with this number."""
    return f"node-{index}"


class Credentials:
    """The keys, certificates and tokens in a cluster's `pki` folder."""

    def __init__(self, state: Path) -> None:
        self._folder = state / "pki"
        self.authority = self._folder / "ca.crt"
        self.service_account_key = self._folder / "service-account.key"
        self.service_account_public_key = self._folder / "service-account.pub"
        self.tokens = self._folder / "tokens.csv"

    def ensure(self, server_names: tuple[str, ...]) -> None:
        """Make what is missing. `server_names` are subjectAltName entries such as
        `IP:127.0.0.1`.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self.authority.exists():
            self._make_authority()
        if not self.service_account_public_key.exists():
            self._make_service_account_key()
        self.certificate("apiserver", extensions=(f"subjectAltName={','.join(server_names)}",))
        self.certificate(
            "kubelet-client",
            "/O=system:masters/CN=kube-apiserver",
            ("extendedKeyUsage=clientAuth",),
        )
        if not self.tokens.exists():
            nodes = (node_user(node_name(index)) for index in range(MAX_NODES))
            users = (ADMIN, CONTROLLER_MANAGER, SCHEDULER, PROXY, *nodes)
            paths.write_atomically(
                self.tokens, render_tokens({user: secrets.token_hex(20) for user in users}), 0o600
            )

    def certificate(
        self, name: str, subject: str = "", extensions: tuple[str, ...] = ()
    ) -> tuple[Path, Path]:
        """A certificate of our authority and its key, made on first use."""
        certificate, key = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        if not certificate.exists():
            unfinished = certificate.with_suffix(".new")
            signer = ("-CA", self.authority, "-CAkey", self._folder / "ca.key")
            leaf = ("basicConstraints=critical,CA:FALSE", *extensions)
            added = [word for extension in leaf for word in ("-addext", extension)]
            what = (
                "-days",
                _DAYS,
                "-subj",
                subject or f"/CN={name}",
                "-keyout",
                key,
                "-out",
                unfinished,
            )
            run(["openssl", "req", "-x509", *_EC_KEY, *signer, *what, *added])
            unfinished.rename(certificate)
        return certificate, key

    def token(self, user: User) -> str:
        """The bearer token of a static identity."""
        for line in self.tokens.read_text().splitlines():
            token, name, *_ = line.split(",")
            if name == user.name:
                return token
        raise KeyError(user.name)

    def kubeconfig(self, url: str, token: str) -> str:
        """A kubeconfig for whoever holds this token."""
        return render_kubeconfig(url, self.authority.read_bytes(), token)

    def _make_authority(self) -> None:
        unfinished = self.authority.with_suffix(".new")
        usage = "keyUsage=critical,keyCertSign,cRLSign"
        subject = ("-subj", "/CN=hotweights-localcluster", "-addext", usage)
        key = self._folder / "ca.key"
        run(
            [
                "openssl",
                "req",
                "-x509",
                *_EC_KEY,
                *subject,
                "-days",
                _DAYS,
                "-keyout",
                key,
                "-out",
                unfinished,
            ]
        )
        unfinished.rename(self.authority)

    def _make_service_account_key(self) -> None:
        unfinished = self.service_account_public_key.with_suffix(".new")
        curve = ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
        run(["openssl", "genpkey", *curve, "-out", self.service_account_key])
        run(["openssl", "pkey", "-in", self.service_account_key, "-pubout", "-out", unfinished])
        unfinished.rename(self.service_account_public_key)


def render_tokens(tokens: dict[User, str]) -> str:
    """The API server's static token file: token, user, uid, and the groups in quotes."""
    return "".join(
        f'{token},{user.name},{user.name},"{",".join(user.groups)}"\n'
        for user, token in tokens.items()
    )


def render_kubeconfig(url: str, authority: bytes, token: str) -> str:
    """A kubeconfig with everything inside it. JSON is YAML, so no YAML library is needed."""
    name = "hotweights"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": name,
                "cluster": {
                    "server": url,
                    "certificate-authority-data": base64.b64encode(authority).decode(),
                },
            }
        ],
        "users": [{"name": name, "user": {"token": token}}],
        "contexts": [
            {"name": name, "context": {"cluster": name, "user": name, "namespace": "default"}}
        ],
        "current-context": name,
    }
    return json.dumps(config, indent=2) + "\n"
