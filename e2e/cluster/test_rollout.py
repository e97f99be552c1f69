"""A version comes, goes back, and comes again, and nobody but the answers notices."""

from __future__ import annotations

import re
import time

from e2e.cluster.conftest import answers
from e2e.harness import samples
from e2e.harness.environment import SAMPLES, Environment
from e2e.harness.kubectl import eventually
from e2e.harness.reach import reach
from e2e.harness.traffic import Traffic


def test_there_and_back_and_there_again(
    environment: Environment, cold: dict[str, list[int]]
) -> None:
    kubectl = environment.in_samples
    assert answers(environment) == [cold["v0"]] * 2
    with (
        reach(environment, kubectl.pods("app=tiny-llama"), 8000) as addresses,
        Traffic(addresses) as traffic,
    ):
        for version, file in (
            ("v1", "weightrollout.yaml"),
            ("v0", "weightrollout-v0.yaml"),
            ("v1", "weightrollout.yaml"),
        ):
            began = time.monotonic()
            kubectl.apply(SAMPLES / file)
            samples.until_ready(environment)
            print(f"{version}: apply to Ready in {time.monotonic() - began:.1f} s")
            assert {
                pod["metadata"]["labels"]["hotweights.dev/version"]
                for pod in kubectl.pods("app=tiny-llama")
            } == {version}
    assert answers(environment) == [cold["v1"]] * 2
    assert traffic.failures == []
    assert len(traffic.answered) == 2
    assert min(traffic.answered.values()) > 10, "every pod was asked all the while"
    eventually(
        "engines of other tests are forgotten", lambda: len(samples.engine_status(environment)) == 2
    )
    pauses = [engine["pauseSeconds"] for engine in samples.engine_status(environment).values()]
    print(
        f"pauses: {[f'{pause * 1000:.0f} ms' for pause in pauses]}; slowest request "
        f"{traffic.slowest_seconds:.2f} s"
    )


def test_the_printed_columns_tell_the_story(environment: Environment) -> None:
    kubectl = environment.in_samples
    kubectl.apply(SAMPLES / "weightrollout.yaml")
    samples.until_ready(environment)
    assert "v1" in kubectl("get", "weightrollouts")
    assert "Complete" in kubectl("get", "wroll", "-o", "wide")
    assert "tiny-llama-v1" in kubectl("get", "wver")
    assert "2/2" in kubectl("get", "wroll")
    assert kubectl("get", "nw", "--all-namespaces").count("1/1") == 2
    shown = kubectl("get", "pods", "-L", "hotweights.dev/version", "--no-headers")
    assert [line.split()[-1] for line in shown.splitlines()] == ["v1"] * 2
    assert re.search(r"Version:\s+v1\n", kubectl("describe", "wroll", "tiny-llama"))
    eventually("the event, which is written after the status", lambda: _tells_complete(environment))


def _tells_complete(environment: Environment) -> bool:
    described = environment.in_samples("describe", "wroll", "tiny-llama")
    return bool(re.search(r"Normal\s+Complete", described.partition("Events:")[2]))
