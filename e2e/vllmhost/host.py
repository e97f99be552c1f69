"""The sample's vLLM image on a cluster of this machine: a small image under the same name, and the
host's vLLM mounted into it.

The samples are applied word for word, so what this machine needs cannot stand in them. A mutating
policy of the demo's own adds the mounts to every container that has the sample's image; Hotweights'
policy is another one and knows nothing of it. On a cluster that pulls images neither is needed.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from localcluster import images
from localvllm import build

IMAGE = f"vllm/vllm-openai-cpu:v{build.VLLM_VERSION}"
POLICY = "local-vllm"
_MOUNTED_AT = "/opt/vllm"


def archive() -> Path:
    """The image, to be loaded into the nodes."""
    return images.build(Path(__file__).parent, f"docker.io/{IMAGE}")


def policy() -> list[dict[str, Any]]:
    """The mutating policy and its binding, to be applied before the first pod is created."""
    volumes = {"local-vllm": (str(build.ensure()), _MOUNTED_AT)}
    python = _python_installation()
    if python != "/usr":  # Debian's own is in the image as well
        volumes["local-python"] = (python, python)
    return [
        {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "MutatingAdmissionPolicy",
            "metadata": {"name": POLICY},
            "spec": {
                "failurePolicy": "Fail",
                "reinvocationPolicy": "IfNeeded",
                "matchConstraints": {
                    "resourceRules": [
                        {
                            "apiGroups": [""],
                            "apiVersions": ["v1"],
                            "operations": ["CREATE"],
                            "resources": ["pods"],
                        }
                    ]
                },
                "matchConditions": [
                    {
                        "name": "has-the-image",
                        "expression": f"object.spec.containers.exists(c, c.image == '{IMAGE}')",
                    }
                ],
                "mutations": [
                    {
                        "patchType": "ApplyConfiguration",
                        "applyConfiguration": {"expression": _expression(volumes)},
                    }
                ],
            },
        },
        {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "MutatingAdmissionPolicyBinding",
            "metadata": {"name": POLICY},
            "spec": {"policyName": POLICY},
        },
    ]


def _expression(volumes: dict[str, tuple[str, str]]) -> str:
    """Volumes by name, with the host's path and the container's."""
    added = ", ".join(
        f"Object.spec.volumes{{name: '{name}', hostPath: Object.spec.volumes.hostPath{{path: '{host}', type: 'Directory'}}}}"
        for name, (host, _) in volumes.items()
    )
    mounts = ", ".join(
        f"Object.spec.containers.volumeMounts{{name: '{name}', mountPath: '{inside}', readOnly: true}}"
        for name, (_, inside) in volumes.items()
    )
    return (
        f"Object{{spec: Object.spec{{volumes: [{added}], containers: object.spec.containers.filter(c, c.image == '{IMAGE}')"
        f".map(c, Object.spec.containers{{name: c.name, volumeMounts: [{mounts}]}})}}}}"
    )


def _python_installation() -> str:
    """Where the interpreter lives that vLLM's virtual environment links to."""
    ask = "import sys; print(sys.base_prefix)"
    return subprocess.run(
        [build.python(), "-c", ask], capture_output=True, text=True, check=True
    ).stdout.strip()
