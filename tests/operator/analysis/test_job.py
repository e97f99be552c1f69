"""Jobs on a real API server, whose controllers run them: a kubelet's word is all that is played."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from hotweights_crds.analysis import JobRun, Metric
from hotweights_kube import JOBS, PODS, WEIGHT_ROLLOUTS, Api, NotFound
from hotweights_kube.client import Selection
from hotweights_operator.model.measurements import Measure, MeasurementId, Reading
from hotweights_operator.runtime.measure import job
from hotweights_operator.runtime.measure.client import NoResult
from localcluster.controlplane import ControlPlane
from tests.operator.conftest import eventually

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(300, func_only=True)]

SPEC = {
    "template": {
        "spec": {
            "restartPolicy": "Never",
            "containers": [{"name": "load", "image": "none", "args": ["{{canary-version}}"]}],
        }
    }
}


def metric(spec: dict[str, Any], **fields: Any) -> Metric:
    return Metric.from_dict({"name": "load-test", "job": {"spec": spec, **fields}})


async def wanted(scene: Any, spec: dict[str, Any] | None = None, number: int = 1) -> Measure:
    """The measurement of a rollout that exists."""
    try:
        owner = await scene.api.get(WEIGHT_ROLLOUTS, "llm", scene.namespace)
    except NotFound:
        await scene.set_up(0)
        owner = await scene.api.create(WEIGHT_ROLLOUTS, scene.rollout("v1"))
    id_ = MeasurementId(owner["metadata"]["uid"], 2, 1, "2026-01-01T12:00:00Z", "load-test", number)
    return Measure(id_, metric(spec or SPEC), scene.namespace, "llm")


def run_of(measure: Measure) -> JobRun:
    if measure.metric.job is None:
        raise LookupError("a metric without a Job")
    return measure.metric.job


def measuring(api: Api, measure: Measure) -> asyncio.Task[Reading]:
    meter = job.JobMeter(api, poll_seconds=0.2)
    return asyncio.create_task(meter.measure(measure, run_of(measure)))


async def pod_ends(scene: Any, phase: str, name: str) -> None:
    """What a kubelet says of the Job's pod, once there is one."""
    found: list[Any] = []

    async def there_is_one() -> bool:
        selection = Selection(
            scene.namespace, label_selector=f"batch.kubernetes.io/job-name={name}"
        )
        found[:] = (await scene.api.list(PODS, selection)).items
        return bool(found)

    await eventually(there_is_one, "the Job has a pod")
    code = 0 if phase == "Succeeded" else 3
    ended = {
        "name": "load",
        "image": "none",
        "imageID": "",
        "ready": False,
        "restartCount": 0,
        "state": {"terminated": {"exitCode": code}},
    }
    await scene.api.merge_patch(
        PODS,
        found[0]["metadata"]["name"],
        {"status": {"phase": phase, "containerStatuses": [ended]}},
        namespace=scene.namespace,
        subresource="status",
    )


@pytest.mark.parametrize(("phase", "value"), [("Succeeded", True), ("Failed", False)])
async def test_its_end_is_the_result(scene: Any, phase: str, value: bool) -> None:
    measure = await wanted(scene)
    task = measuring(scene.api, measure)
    name = job.name_of("llm", measure.id)
    await pod_ends(scene, phase, name)
    reading = await task
    assert reading.value is value
    assert name in reading.text
    made = await scene.api.get(JOBS, name, scene.namespace)
    (owner,) = made["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("WeightRollout", measure.id.rollout)
    spec = made["spec"]
    assert (spec["activeDeadlineSeconds"], spec["backoffLimit"]) == (3600, 0)
    assert spec["ttlSecondsAfterFinished"] == 3600


async def test_an_operator_that_starts_anew_finds_the_one_that_runs(scene: Any) -> None:
    measure = await wanted(scene)
    first = measuring(scene.api, measure)
    name = job.name_of("llm", measure.id)

    async def exists() -> bool:
        return bool(await scene.api.get(JOBS, name, scene.namespace))

    await eventually(exists, "the Job is made")
    first.cancel()
    second = measuring(scene.api, measure)
    await pod_ends(scene, "Succeeded", name)
    assert (await second).value is True
    assert len((await scene.api.list(JOBS, Selection(scene.namespace))).items) == 1


async def test_the_next_measurement_is_another_job(scene: Any) -> None:
    one, two = await wanted(scene), await wanted(scene, number=2)
    other = replace(one.id, begun="2026-01-01T13:00:00Z")
    names = {job.name_of("llm", id_) for id_ in (one.id, two.id, other)}
    assert len(names) == 3
    assert all(len(job.name_of("x" * 253, id_)) <= 63 for id_ in (one.id, two.id))


async def test_what_no_api_server_takes_says_why(scene: Any) -> None:
    bad = {"template": {"spec": {"restartPolicy": "Always", "containers": []}}}
    with pytest.raises(NoResult, match=r"(?i)unsupported value|required"):
        await measuring(scene.api, await wanted(scene, bad))


async def test_one_that_somebody_deletes_is_no_result(scene: Any) -> None:
    measure = await wanted(scene)
    task = measuring(scene.api, measure)
    name = job.name_of("llm", measure.id)

    async def deleted() -> bool:
        await scene.api.delete(JOBS, name, namespace=scene.namespace)
        return True

    await eventually(deleted, "it is there to be deleted")
    with pytest.raises(NoResult, match="not found"):
        await task


async def test_somebody_else_s_job_of_that_name_is_left_alone(scene: Any) -> None:
    measure = await wanted(scene)
    theirs = job.body(measure, run_of(measure))
    del theirs["metadata"]["ownerReferences"]
    await scene.api.create(JOBS, theirs)
    with pytest.raises(NoResult, match="belongs to somebody else"):
        await measuring(scene.api, measure)


async def test_without_the_right_it_says_which_value_gives_it(
    scene: Any, control_plane: ControlPlane
) -> None:
    measure = await wanted(scene)
    kubeconfig = control_plane.kubeconfig_for(scene.namespace, "default")
    async with await Api.connect(kubeconfig, timeout_seconds=30) as nobody:
        with pytest.raises(NoResult, match=r"analysis\.jobs\.enabled=true"):
            await measuring(nobody, measure)
