"""Argo CD without a cluster of its own: its controller, its repository server and its API server as
processes of this machine, beside a control plane. They are the real ones; only what would hold them
(Deployments, Services, TLS between them) is left out.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from localcluster import binaries
from localcluster.controlplane import ControlPlane
from tests.operator.conftest import ROOT, Kubectl
from tests.ports import free_ports

NAMESPACE = "argocd"
APPLICATIONS = "applications.argoproj.io"
PATIENCE_SECONDS = 300.0
_READY_WITHIN_SECONDS = 180.0
_POLL_SECONDS = 0.5
_REFRESH_TURNS = 10
_PARTS = ("argocd-redis", "argocd-repo-server", "argocd-application-controller", "argocd-server")
Body = dict[str, Any]


class Repository:
    """A Git repository on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self._git("init", "--quiet", "--initial-branch=main")

    @property
    def url(self) -> str:
        """Where Argo CD clones it from."""
        return f"file://{self.folder}"

    def commit(self, subject: str, **files: Body) -> str:
        """Write these objects, each in ``models/NAME.json``, and commit; gives back the hash."""
        for name, body in files.items():
            path = self.folder / "models" / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(body, indent=2))
        self._git("add", "--all")
        self._git("commit", "--quiet", f"--message={subject}")
        return self._git("rev-parse", "HEAD").strip()

    def _git(self, *words: str) -> str:
        author = ["-c", "user.name=Trainer", "-c", "user.email=trainer@example.com"]
        command = ["git", "-C", str(self.folder), *author, *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60
        ).stdout


class ArgoCD:
    """One that follows a control plane, and what it says."""

    def __init__(self, plane: ControlPlane, kubectl: Kubectl) -> None:
        self._plane, self._kubectl = plane, kubectl
        self._program = binaries.ensure(["argocd"])["argocd"]
        self._home = plane.state / "argocd"
        redis, repo, metrics, server, more, other = free_ports(6)
        self._redis, self._repo, self._server = redis, repo, server
        self._metrics = {"repo": metrics, "controller": more, "server": other}

    def start(self) -> None:
        """Install what the release installs, with our patch of ``argocd-cm``, and start its parts."""
        source = binaries.source_of("argocd")
        definitions = sorted((source / "manifests" / "crds").glob("*-crd.yaml"))
        config = sorted((source / "manifests" / "base" / "config").glob("argocd-*.yaml"))
        self._kubectl("create", "namespace", NAMESPACE)
        for path in definitions:  # created: they are too large for an annotation, and slow to merge
            self._kubectl("create", f"--filename={path}")
        self._kubectl("wait", "--for=condition=Established", f"crd/{APPLICATIONS}", "--timeout=90s")
        self._kubectl(
            "apply", f"--namespace={NAMESPACE}", *(f"--filename={path}" for path in config)
        )
        ours = ROOT / "config" / "argocd" / "argocd-cm.yaml"
        self._kubectl(
            "patch", "configmap", "argocd-cm", f"--namespace={NAMESPACE}", f"--patch-file={ours}"
        )
        self._start_parts()

    def _start_parts(self) -> None:
        redis, repo = f"127.0.0.1:{self._redis}", f"127.0.0.1:{self._repo}"
        program = shutil.which("redis-server")
        if program is None:
            raise FileNotFoundError(
                "redis-server is missing: install the Debian package redis-server"
            )
        memory = ["--save", "", "--appendonly", "no"]
        self._plane.daemons.start(
            "argocd-redis", [program, "--bind", "127.0.0.1", "--port", str(self._redis), *memory]
        )
        to_repo = [f"--repo-server={repo}", "--repo-server-plaintext", f"--redis={redis}"]
        here = ["--namespace", NAMESPACE]
        self._start("argocd-repo-server", "--disable-tls", "--address=127.0.0.1",
            f"--port={self._repo}", f"--metrics-port={self._metrics['repo']}", f"--redis={redis}",
        )  # fmt: skip
        self._start("argocd-application-controller", *to_repo, *here,
            f"--metrics-port={self._metrics['controller']}", "--persist-resource-health",
        )  # fmt: skip
        self._start("argocd-server", *to_repo, *here, "--insecure", "--disable-auth",
            "--address=127.0.0.1", f"--port={self._server}",
            f"--metrics-port={self._metrics['server']}",
        )  # fmt: skip
        self._plane.daemons.wait_until(
            self._is_up, "Argo CD is up", needs=_PARTS, timeout_seconds=_READY_WITHIN_SECONDS
        )

    def _start(self, name: str, *words: str) -> None:
        for folder in ("tls", "ssh", "gpg", "plugins", "tmp"):
            (self._home / folder).mkdir(parents=True, exist_ok=True)
        environment = {
            **self._environment(),
            "ARGOCD_BINARY_NAME": name,
            "ARGOCD_FAKE_IN_CLUSTER": "true",  # its cluster is the one that KUBECONFIG names
            "ARGOCD_GPG_ENABLED": "false",
            "ARGOCD_TLS_DATA_PATH": str(self._home / "tls"),
            "ARGOCD_SSH_DATA_PATH": str(self._home / "ssh"),
            "ARGOCD_PLUGINSOCKFILEPATH": str(self._home / "plugins"),
            "ARGOCD_ASK_PASS_SOCK": str(self._home / "askpass.sock"),
            "HOSTNAME": f"{name}-0",
            "TMPDIR": str(self._home / "tmp"),
        }
        self._plane.daemons.start(name, [self._program, *words], environment=environment)

    def _environment(self) -> dict[str, str]:
        return {"KUBECONFIG": str(self._plane.kubeconfig), "HOME": str(self._home)}

    def _is_up(self) -> bool:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self._server}/healthz?full=true", timeout=10
            ):
                return True
        except (urllib.error.URLError, OSError):
            return False

    # -- what it is told ------------------------------------------------------------------------

    def follow(self, name: str, repository: Repository, namespace: str) -> None:
        """An Application that brings the folder ``models`` into a namespace, and heals it."""
        body = {
            "apiVersion": "argoproj.io/v1alpha1",
            "kind": "Application",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {
                "project": "default",
                "source": {
                    "repoURL": repository.url,
                    "path": "models",
                    "targetRevision": "main",
                },
                "destination": {
                    "server": "https://kubernetes.default.svc",
                    "namespace": namespace,
                },
                "syncPolicy": {"automated": {"prune": True, "selfHeal": True}},
            },
        }
        self._kubectl.apply(body)

    def refresh(self, name: str) -> None:
        """Have it look at the repository and the cluster now, as a webhook would."""
        self._kubectl("annotate", "--overwrite", APPLICATIONS, name, f"--namespace={NAMESPACE}",
            "argocd.argoproj.io/refresh=normal",
        )  # fmt: skip

    def act(self, name: str, action: str) -> str:
        """Run one of the actions on the Application's WeightRollout, as the button does."""
        return self._cli("app", "actions", "run", name, action, "--kind=WeightRollout")

    def actions(self, name: str) -> set[str]:
        """Those that are offered for it now."""
        words = ("app", "actions", "list", name, "--kind=WeightRollout", "--out=json")
        return {row["Action"] for row in json.loads(self._cli(*words)) if not row["Disabled"]}

    def _cli(self, *words: str) -> str:
        command: list[str | Path] = [
            self._program,
            *words,
            f"--server=127.0.0.1:{self._server}",
            "--plaintext",
        ]
        done = subprocess.run(
            command,
            env={**self._environment(), "ARGOCD_BINARY_NAME": "argocd"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"argocd {' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def forget(self, name: str) -> None:
        """Take the Application away, and leave what it brought."""
        self._kubectl("delete", APPLICATIONS, name, f"--namespace={NAMESPACE}", "--timeout=60s")

    # -- what it says ---------------------------------------------------------------------------

    def application(self, name: str) -> Body:
        """The Application's status."""
        words = ("get", APPLICATIONS, name, f"--namespace={NAMESPACE}", "--output=json")
        status: Body = json.loads(self._kubectl(*words)).get("status") or {}
        return status

    def health(self, name: str) -> tuple[str, str]:
        """The word and the sentence for the Application's WeightRollout."""
        found = [r for r in self._resources(name) if r["kind"] == "WeightRollout"]
        health = found[0].get("health", {}) if found else {}
        return health.get("status", ""), health.get("message", "")

    def knows(self, name: str, resource: str, status: str) -> bool:
        """Whether it says this of one of the Application's objects."""
        return any(
            r["name"] == resource and r.get("health", {}).get("status") == status
            for r in self._resources(name)
        )

    def _resources(self, name: str) -> list[Body]:
        return list(self.application(name).get("resources", ()))

    def until(self, name: str, status: str, *, revision: str = "", message: str = "") -> Body:
        """Wait until the Application has synced this commit, is of this health, and its rollout too,
        for this reason; the Application's status then. It is asked to look again meanwhile: by itself
        it takes a new word, and a new sentence only together with one.
        """
        end = time.monotonic() + PATIENCE_SECONDS
        for turn in itertools.count(1):
            if turn % _REFRESH_TURNS == 0:
                self.refresh(name)
            found, health = self.application(name), self.health(name)
            synced = found.get("sync", {})
            if (
                found.get("health", {}).get("status") == status == health[0]
                and message in health[1]
                and synced.get("status") == "Synced"
                and revision in ("", synced.get("revision"))
            ):
                return found
            if time.monotonic() > end:
                parts = {part: self._plane.daemons.log(part) for part in _PARTS}
                last = {name: log.read_text()[-800:] for name, log in parts.items() if log.exists()}
                raise TimeoutError(f"{name} is not {status} ({message}): {found}\n{health}\n{last}")
            time.sleep(_POLL_SECONDS)
        raise AssertionError("counting has no end")
