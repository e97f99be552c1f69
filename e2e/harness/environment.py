"""The cluster that demo and e2e run on, with Hotweights installed as a user installs it.

Without KUBECONFIG it is a cluster of this machine (`localcluster`), with images built from this
tree. With KUBECONFIG it is that cluster; its user pushed the image to the registry that
HOTWEIGHTS_REGISTRY names, and copied the models into the folder of the nodes that HOTWEIGHTS_MODELS
names. The chart allows that folder as a source, and a PersistentVolumeClaim shows it to the vLLM
pods.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from e2e.harness.kubectl import CommandFailed, Kubectl, run
from e2e.harness.story import step
from e2e.vllmhost import host
from localcluster import Cluster, binaries, images
from localvllm import build as vllm_build
from localvllm import models
from localvllm.models import Model

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "config" / "samples"
NAMESPACE = "hotweights-samples"
SYSTEM = "hotweights-system"
RELEASE = "hotweights"
MODELS_IN_PODS = "/models"
EXTRAS = "operator,agent,mpi"  # with what agent.transports may switch on here


class NotSet(Exception):
    """Something that only the user can give is missing."""


@dataclass(frozen=True, slots=True)
class Environment:
    """A cluster with Hotweights on it."""

    kubectl: Kubectl
    helm: Path
    models: Path  # on this machine
    models_on_nodes: Path  # the same folder, unless the cluster is somebody else's
    cluster: Cluster | None  # None: somebody else's

    @property
    def in_samples(self) -> Kubectl:
        """kubectl in the samples' namespace."""
        return Kubectl(self.kubectl.binary, self.kubectl.kubeconfig, NAMESPACE)


def models_folder() -> Path:
    """Where `make_models` puts them."""
    return vllm_build.cache() / "e2e-models"


def make_models() -> Path:
    """The folder with v0 and v1 of the samples' model: two seeds of one architecture, fresh copies
    of what was made once.
    """
    made, folder = vllm_build.cache() / "models", models_folder()
    with step("vLLM for CPUs, and two versions of a tiny Llama"):
        vllm_build.ensure()
        models.make_models(
            [Model(made / "tiny-llama" / f"v{seed}", "llama", seed) for seed in (0, 1)]
        )
        for version in ("v0", "v1"):
            if not (made / "tiny-llama" / version / "hotweights.manifest.json").exists():
                publish(
                    made / "tiny-llama" / version,
                    version,
                    "--record-probes",
                    "--probe-dtype",
                    "float32",
                )
    shutil.rmtree(
        folder / "tiny-llama", ignore_errors=True
    )  # an earlier run may have been killed in the middle of a change
    shutil.copytree(made / "tiny-llama", folder / "tiny-llama")
    return folder


def publish(checkpoint: Path, version: str, *options: str) -> str:
    """``hotweights publish``, as a user runs it; the digest that it prints."""
    command = (
        sys.executable,
        "-m",
        "hotweights.cli",
        "publish",
        "--checkpoint",
        checkpoint,
        "--model",
        "tiny-llama",
    )
    printed = run(
        *command,
        "--version",
        version,
        "--json",
        *options,
        env={"HOTWEIGHTS_VLLM_PYTHON": str(vllm_build.python())},
        timeout_seconds=600,
    )
    return str(json.loads(printed)["digest"])


def provide(nodes: int = 2, most_restart_seconds: int | None = None) -> Environment:
    """A cluster with Hotweights installed and the samples' namespace ready; what is there already
    is kept. ``most_restart_seconds``: how long a kubelet of this machine may wait before it starts
    a container again.
    """
    given = somebody_elses()
    here = make_models()
    tools = binaries.ensure(["kubectl", "helm"])
    if given is not None:
        kubectl = Kubectl(tools["kubectl"], given)
        environment = Environment(
            kubectl, tools["helm"], here, Path(os.environ["HOTWEIGHTS_MODELS"]), None
        )
    else:
        with step(f"a Kubernetes cluster with {nodes} nodes on this machine"):
            cluster = Cluster.up(nodes=nodes, most_restart_seconds=most_restart_seconds)
        with step("images, built from this tree and loaded into the nodes"):
            cluster.load(*build_images())
        kubectl = Kubectl(tools["kubectl"], cluster.kubeconfig)
        environment = Environment(kubectl, tools["helm"], here, here, cluster)
        environment.kubectl(
            "apply", "--filename", "-", stdin=str(yaml.safe_dump_all(host.policy()))
        )
    install(environment)
    return environment


def somebody_elses(variables: Mapping[str, str] = os.environ) -> Path | None:
    """The kubeconfig of a cluster that is not ours; None: use ours. Raises `NotSet` for what only
    its user can give.
    """
    given = variables.get("KUBECONFIG", "")
    if not given:
        return None
    if not Path(given).is_file():
        raise NotSet(
            f"KUBECONFIG={given} is no file; one for several is made by: kubectl config view "
            "--flatten > FILE"
        )
    if not variables.get("HOTWEIGHTS_REGISTRY"):
        raise NotSet(
            "With KUBECONFIG, set HOTWEIGHTS_REGISTRY: where the image of images/Dockerfile was "
            f"pushed to, as $HOTWEIGHTS_REGISTRY/hotweights:{version()}"
        )
    if not Path(variables.get("HOTWEIGHTS_MODELS", "")).is_absolute():
        raise NotSet(
            "With KUBECONFIG, set HOTWEIGHTS_MODELS: the absolute path of a folder on every "
            "node that holds a copy of "
            f"{models_folder()} (made by the first run without KUBECONFIG, or: python -m "
            "e2e.harness.environment)"
        )
    return Path(given).resolve()


def build_images() -> Sequence[Path]:
    """Archives of the image of operator and agent, and of what stands in for the sample's vLLM
    image.
    """
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"][
        "targets"
    ]["wheel"]
    packages = [ROOT / package for package in wheel["packages"]]
    inputs = [ROOT / "pyproject.toml", *packages]
    return [
        images.build(
            ROOT,
            f"localhost/hotweights:{version()}",
            dockerfile=ROOT / "images" / "Dockerfile",
            arguments={"EXTRAS": EXTRAS},
            inputs=inputs,
        ),
        host.archive(),
    ]


def version() -> str:
    """The chart's appVersion, which is the images' tag."""
    chart = yaml.safe_load((ROOT / "helm" / "hotweights" / "Chart.yaml").read_text())
    return str(chart["appVersion"])


def install(environment: Environment, *settings: str) -> None:
    """``helm upgrade --install`` as docs/install.md says, and wait until everything is ready."""
    registry = (
        os.environ.get("HOTWEIGHTS_REGISTRY", "localhost")
        if environment.cluster is None
        else "localhost"
    )
    values = [
        f"image.registry={registry}",
        "sources[0].name=models",
        f"sources[0].path={MODELS_IN_PODS}",
        f"sources[0].hostPath={environment.models_on_nodes}",
        f"sources[0].namespaces={{{NAMESPACE}}}",
        # vLLM's processes spin while they serve, and all nodes share this machine's cores: what
        # decides must not queue behind.
        "operator.resources.requests.cpu=250m",
        "agent.resources.requests.cpu=250m",
        *settings,
    ]
    with step("helm install hotweights"):
        run(
            environment.helm, "--kubeconfig", environment.kubectl.kubeconfig, "upgrade", "--install", RELEASE, ROOT / "helm" / "hotweights",
            "--namespace", SYSTEM, "--create-namespace", "--wait", "--timeout", "300s",
            *[part for value in values for part in ("--set", value)],
            timeout_seconds=330,
        )  # fmt: skip


def diagnose(environment: Environment) -> str:
    """What somebody would look at first when it does not work."""
    kubectl = environment.kubectl
    pieces = []
    for arguments in (
        (
            "get",
            "weightrollouts,weightversions,nodeweights,pods",
            "--all-namespaces",
            "--output",
            "wide",
        ),
        (
            "--namespace",
            SYSTEM,
            "logs",
            "--selector",
            "app.kubernetes.io/component=operator",
            "--tail",
            "40",
        ),
        (
            "--namespace",
            SYSTEM,
            "logs",
            "--selector",
            "app.kubernetes.io/component=agent",
            "--tail",
            "40",
            "--prefix",
        ),
        (
            "--namespace",
            NAMESPACE,
            "logs",
            "--selector",
            "app=tiny-llama",
            "--tail",
            "30",
            "--prefix",
        ),
        ("get", "events", "--all-namespaces", "--sort-by", ".lastTimestamp"),
    ):
        try:
            pieces.append(f"$ kubectl {' '.join(arguments)}\n{kubectl(*arguments)[-6000:]}")
        except CommandFailed as error:
            pieces.append(str(error))
    return "\n".join(pieces)


if __name__ == "__main__":
    print(make_models())
