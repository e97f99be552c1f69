"""Bad input against the real cluster: one clear reason, and the pods go on answering as before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.cluster.conftest import answers
from e2e.harness import checkpoints, samples
from e2e.harness.environment import MODELS_IN_PODS, NAMESPACE, SAMPLES, Environment, publish
from e2e.harness.kubectl import CommandFailed, eventually

TENSOR = "model.layers.0.mlp.down_proj.weight"


def version_object(name: str, uri: str, digest: str = "") -> str:
    """A WeightVersion as JSON."""
    spec = {
        "model": "tiny-llama",
        "version": name,
        "source": {"uri": uri},
        **({"manifest": {"digest": digest}} if digest else {}),
    }
    metadata = {"name": f"tiny-llama-{name}", "namespace": NAMESPACE}
    return json.dumps(
        {
            "apiVersion": "hotweights.dev/v1alpha1",
            "kind": "WeightVersion",
            "metadata": metadata,
            "spec": spec,
        }
    )


def roll_out(environment: Environment, name: str, uri: str = "", digest: str = "") -> None:
    """Create a version and point the rollout at it."""
    create_version(environment, name, uri, digest)
    lead_to(environment, name)


def create_version(environment: Environment, name: str, uri: str = "", digest: str = "") -> None:
    """Anew, where there is one."""
    kubectl = environment.in_samples
    kubectl("delete", "weightversion", f"tiny-llama-{name}", "--ignore-not-found")
    kubectl(
        "apply",
        "-f",
        "-",
        stdin=version_object(name, uri or f"file://{MODELS_IN_PODS}/tiny-llama/{name}", digest),
    )


def lead_to(environment: Environment, name: str) -> None:
    """Point the rollout at a version."""
    environment.in_samples(
        "patch",
        "weightrollout",
        "tiny-llama",
        "--type=merge",
        "-p",
        json.dumps({"spec": {"versionRef": {"name": f"tiny-llama-{name}"}}}),
    )


def refused(environment: Environment, reason: str, *named: str, before: list[list[int]]) -> None:
    """The rollout is stalled for that reason, names these, and the pods answer as before."""
    found = samples.until_condition(environment, "Stalled", reason)
    assert found["status"] == "True"
    for text in named:
        assert text in found["message"], found["message"]
    assert answers(environment) == before
    assert {
        samples.version_of(environment, pod["metadata"]["name"])
        for pod in environment.in_samples.pods("app=tiny-llama")
    } == {"v0"}


def test_a_flipped_byte_stalls_with_file_and_chunk(environment: Environment) -> None:
    before = answers(environment)
    folder = checkpoints.copy(environment.models / "tiny-llama" / "v1", "flipped")
    digest = publish(folder, "flipped")
    checkpoints.flip_byte(folder, TENSOR)
    roll_out(environment, "flipped", digest=digest)
    refused(environment, "ChecksumMismatch", checkpoints.WEIGHTS, "chunk", before=before)


@pytest.mark.parametrize(
    ("name", "breakage", "named"),
    [
        ("truncated", checkpoints.truncate, checkpoints.WEIGHTS),
        (
            "huge-header",
            lambda folder: checkpoints.claim_header_of(folder, 1 << 30),
            checkpoints.WEIGHTS,
        ),
        (
            "path-like",
            lambda folder: checkpoints.rename_tensor(folder, TENSOR, "../../etc/passwd"),
            "../../etc/passwd",
        ),
    ],
)
def test_a_broken_file_is_refused(
    environment: Environment, name: str, breakage: Callable[[Path], None], named: str
) -> None:
    before = answers(environment)
    breakage(checkpoints.copy(environment.models / "tiny-llama" / "v1", name))
    roll_out(environment, name)
    refused(environment, "BadCheckpoint", named, before=before)


@pytest.mark.parametrize(
    ("name", "breakage", "reason"),
    [
        (
            "unknown-tensor",
            lambda folder: checkpoints.rename_tensor(
                folder, TENSOR, "model.layers.9.surprise.weight"
            ),
            "UnknownTensor",
        ),
        ("wrong-shape", lambda folder: checkpoints.transpose(folder, TENSOR), "ShapeMismatch"),
    ],
)
def test_what_does_not_fit_is_refused_at_prepare(
    environment: Environment, name: str, breakage: Callable[[Path], None], reason: str
) -> None:
    before = answers(environment)
    breakage(checkpoints.copy(environment.models / "tiny-llama" / "v1", name))
    roll_out(environment, name)
    refused(environment, reason, "model.layers", before=before)


def test_a_version_that_comes_later_is_waited_for(environment: Environment) -> None:
    kubectl = environment.in_samples
    kubectl("delete", "weightversion", "tiny-llama-v1")
    kubectl.apply(SAMPLES / "weightrollout.yaml")
    found = samples.until_condition(environment, "VersionResolved", "NotFound")
    assert found["status"] == "False"
    kubectl.apply(SAMPLES / "weightversion.yaml")
    samples.until_ready(environment)


def test_a_source_outside_the_roots_is_refused(environment: Environment) -> None:
    before = answers(environment)
    roll_out(environment, "outside", uri="file:///etc")
    refused(environment, "SourceNotAllowed", "/etc", before=before)


def test_a_symlink_out_of_the_roots_is_refused(environment: Environment) -> None:
    before = answers(environment)
    link = environment.models / "tiny-llama" / "symlink"
    link.unlink(missing_ok=True)
    link.symlink_to("/etc")
    roll_out(environment, "symlink")
    refused(environment, "SourceNotAllowed", "symlink", before=before)


def test_two_rollouts_of_one_pod(environment: Environment) -> None:
    kubectl = environment.in_samples
    second = kubectl.get("weightrollout", "tiny-llama")
    body = {
        "apiVersion": second["apiVersion"],
        "kind": second["kind"],
        "spec": second["spec"],
        "metadata": {"name": "second", "namespace": NAMESPACE},
    }
    kubectl("apply", "-f", "-", stdin=json.dumps(body))
    try:
        samples.until_condition(environment, "Stalled", "TargetConflict", name="second")
        assert samples.condition(environment, "Ready")["status"] == "True"
    finally:
        kubectl("delete", "weightrollout", "second")


def reasons(environment: Environment, pod: str) -> list[str]:
    """Why the rollout's status says that this pod does not follow."""
    failures = environment.in_samples.get("weightrollout", "tiny-llama")["status"].get(
        "failures", []
    )
    return [failure["reason"] for failure in failures if failure["pod"] == pod]


def test_a_pod_without_the_plugin_is_named(environment: Environment) -> None:
    """It is selected and opted in, but what runs in it is no vLLM."""
    kubectl = environment.in_samples
    image = kubectl.pods("app=tiny-llama")[0]["spec"]["containers"][0]["image"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "stranger",
            "namespace": NAMESPACE,
            "labels": {"app": "tiny-llama", "hotweights.dev/inject": "true"},
        },
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "containers": [
                {
                    "name": "main",
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["sleep", "600"],
                }
            ],
        },
    }
    kubectl("apply", "-f", "-", stdin=json.dumps(pod))
    try:
        kubectl.apply(SAMPLES / "weightrollout.yaml")
        eventually(
            "stranger named as not connected",
            lambda: "EngineNotConnected" in reasons(environment, "stranger"),
            300,
        )
        eventually(
            "the others go on",
            lambda: kubectl.get("weightrollout", "tiny-llama")["status"]["pods"]["updated"] == 2,
            timeout_seconds=300,
        )
    finally:
        kubectl("delete", "pod", "stranger", "--wait=true")


def test_invalid_objects_are_rejected_with_the_remedy(environment: Environment) -> None:
    kubectl = environment.in_samples
    with pytest.raises(CommandFailed, match="write file:///absolute/path or pvc://claim/path"):
        kubectl("apply", "-f", "-", stdin=version_object("bad", "ftp://somewhere"))
    with pytest.raises(CommandFailed, match="a WeightVersion is immutable"):
        kubectl(
            "patch",
            "weightversion",
            "tiny-llama-v0",
            "--type=merge",
            "-p",
            '{"spec": {"version": "v9"}}',
        )
