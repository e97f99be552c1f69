"""A witness says what it has seen: silence is not excused by a moment, and a status that says
nothing is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from e2e.harness import witness
from e2e.harness.kubectl import CommandFailed, TimedOut, eventually
from e2e.harness.tape import Said
from e2e.harness.witness import Account, judge, watch_labels

Body = dict[str, Any]
COLD = {"v0": [1, 2], "v1": [3, 4]}
SECONDS = 30


def pod(*, ready: bool = True, version: str = "v0", life: str = "one") -> Body:
    return {
        "metadata": {"name": "llm-0", "uid": "u", "labels": {witness.LABEL: version}},
        "spec": {"nodeName": "node-0"},
        "status": {
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
            "containerStatuses": [{"containerID": life}],
        },
    }


class Pods:
    """The cluster as the witness sees it: what is there now."""

    def __init__(self, *pods: Body) -> None:
        self.there = list(pods)
        self.in_samples = self

    def pods(self, selector: str) -> list[Body]:
        return list(self.there)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pods are at hand, and nobody waits long."""

    @contextmanager
    def at_hand(environment: Any, pods: Sequence[Body], port: int) -> Iterator[list[str]]:
        yield [str(one["metadata"]["name"]) for one in pods]

    monkeypatch.setattr(witness, "reach", at_hand)
    monkeypatch.setattr(witness, "EVERY_SECONDS", 0.01)
    monkeypatch.setattr(witness, "EXCUSED_SECONDS", 0.1)


def watch(
    monkeypatch: pytest.MonkeyPatch, cluster: Any, answer: Callable[[], list[int]]
) -> Account:
    """A witness that has asked a few times."""
    asked: list[None] = []

    def complete(address: str, prompt: Any, tokens: int, timeout_seconds: float) -> list[int]:
        asked.append(None)
        return answer()

    monkeypatch.setattr(witness, "complete_ids", complete)
    with watch_labels(cluster, "app=llm", COLD, [1], 2) as account:
        eventually("it has asked", lambda: len(asked) >= 3, SECONDS, 0.01)
    return account


def test_answers_are_counted_by_version(monkeypatch: pytest.MonkeyPatch) -> None:
    account = watch(monkeypatch, Pods(pod()), lambda: [1, 2])
    assert account.lies == []
    assert account.compared["v0"] >= 2


def test_the_other_version_is_a_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    account = watch(monkeypatch, Pods(pod()), lambda: [3, 4])
    assert "labelled v0 and answers as ['v1']" in account.lies[0]


def silent() -> list[int]:
    raise TimeoutError("no answer")


@pytest.mark.parametrize(
    "afterwards",
    [[pod()], [pod(ready=False)], [pod(version="")]],
    ids=["Ready", "not Ready for a moment", "without a label"],
)
def test_silence_of_a_container_that_lives_on_is_told(
    monkeypatch: pytest.MonkeyPatch, afterwards: list[Body]
) -> None:
    cluster = Pods(pod())

    def answer() -> list[int]:
        cluster.there = afterwards if len(asked) >= 2 else cluster.there
        asked.append(None)
        return silent()

    asked: list[None] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(witness, "complete_ids", lambda *_, **__: answer())
        with watch_labels(cluster, "app=llm", COLD, [1], 2) as account:  # type: ignore[arg-type]
            eventually("it has asked", lambda: len(asked) >= 3, SECONDS, 0.01)
    assert ["does not: llm-0: TimeoutError" in lie for lie in account.lies] == [True]


@pytest.mark.parametrize("afterwards", [[pod(life="two")], []], ids=["another life", "gone"])
def test_silence_of_a_container_that_ended_is_excused(
    monkeypatch: pytest.MonkeyPatch, afterwards: list[Body]
) -> None:
    cluster = Pods(pod())

    def answer() -> list[int]:
        if cluster.there != [pod()]:
            return [1, 2]
        cluster.there = afterwards
        return silent()

    monkeypatch.setattr(witness, "complete_ids", lambda *_, **__: answer())
    with watch_labels(cluster, "app=llm", COLD, [1], 2) as account:  # type: ignore[arg-type]
        eventually("it was silent", lambda: account.unanswered, SECONDS, 0.01)
    assert account.lies == []


def test_a_witness_that_cannot_look_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Away:
        in_samples = property(lambda self: self)

        def pods(self, selector: str) -> list[Body]:
            raise TimedOut("the API server is away")

    with (
        pytest.raises(TimedOut, match="away"),
        watch_labels(Away(), "app=llm", COLD, [1], 2),  # type: ignore[arg-type]
    ):
        pass


def test_what_the_test_cut_off_itself_is_neither_a_lie_nor_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Cut(Pods):
        looks = 0

        def pods(self, selector: str) -> list[Body]:
            self.looks += 1
            if self.looks == 2:
                raise CommandFailed("the API server is away")
            return super().pods(selector)

    asked: list[None] = []

    def answer() -> list[int]:
        asked.append(None)
        return silent() if len(asked) == 2 else [1, 2]

    monkeypatch.setattr(witness, "complete_ids", lambda *_, **__: answer())
    with watch_labels(Cut(pod()), "app=llm", COLD, [1], 2, lambda since: True) as account:  # type: ignore[arg-type]
        eventually("it has asked", lambda: account.compared["v0"] >= 2, SECONDS, 0.01)
    assert (account.lies, account.unanswered) == ([], {})


def test_a_version_left_and_come_back_to_meanwhile_is_no_statement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine answered in between, and rightly as the other one."""
    cluster = Pods(pod())

    later = {**pod(), "metadata": {**pod()["metadata"], "resourceVersion": "9"}}

    def answer() -> list[int]:
        is_first, cluster.there = cluster.there != [later], [later]
        return [3, 4] if is_first else [1, 2]

    monkeypatch.setattr(witness, "complete_ids", lambda *_, **__: answer())
    with watch_labels(cluster, "app=llm", COLD, [1], 2) as account:  # type: ignore[arg-type]
        eventually("it has compared", lambda: account.compared["v0"], SECONDS, 0.01)
    assert account.lies == []


# -- what statuses say --------------------------------------------------------------------------


class Story:
    """A tape, as `judge` reads it."""

    def __init__(self) -> None:
        self.said: list[Said] = []

    def add(self, kind: str, name: str, body: Body) -> None:
        number = len(self.said)
        body.setdefault("metadata", {}).update(name=name, resourceVersion=str(number))
        self.said.append(Said(kind, name, body, False, float(number)))

    def rollout(self, version: str, *, ready: bool, stable: str = "") -> None:
        status: Body = {
            "target": {"name": f"n-{version}", "version": version, "digest": f"d-{version}"},
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        }
        if stable:
            status["stable"] = {"name": f"n-{stable}", "version": stable}
        self.add("rollout", "llm", {"status": status})

    def serves(self, label: str, digest: str) -> None:
        self.add("pod", "llm-0", pod(version=label))
        engine = {"podUID": "u", "digest": digest}
        self.add("node", "node-0", {"status": {"engines": [engine]}})


def test_a_true_story_is_counted_by_version() -> None:
    story = Story()
    story.serves("v0", "d-v0")
    story.rollout("v0", ready=True, stable="v0")
    story.rollout("v1", ready=False, stable="v0")
    story.serves("v1", "d-v1")
    story.rollout("v1", ready=True, stable="v1")
    found = judge(story)  # type: ignore[arg-type]
    assert found.lies == []
    assert found.served == {"v0": 2, "v1": 2}
    assert found.named == {"n-v0": 2, "n-v1": 1}


def test_who_says_nothing_is_not_counted() -> None:
    story = Story()
    story.rollout("v0", ready=False)
    story.rollout("v0", ready=False)
    found = judge(story)  # type: ignore[arg-type]
    assert (found.named.total(), found.served.total(), found.lies) == (0, 0, [])


def test_ready_without_a_pod_is_a_lie() -> None:
    story = Story()
    story.rollout("v0", ready=False)
    story.rollout("v0", ready=True)
    assert judge(story).lies == ["Ready with v0, and there is no pod"]  # type: ignore[arg-type]


def test_what_was_never_complete_is_not_stable() -> None:
    story = Story()
    story.rollout("v0", ready=False, stable="v0")
    story.rollout("v1", ready=False, stable="v1")
    (lie,) = judge(story).lies  # type: ignore[arg-type]
    assert lie.startswith("status.stable names n-v1")


def test_an_engine_that_confirms_another_version_makes_ready_a_lie() -> None:
    story = Story()
    story.rollout("v1", ready=False)
    story.serves("v1", "d-v0")
    story.rollout("v1", ready=True)
    (lie,) = judge(story).lies  # type: ignore[arg-type]
    assert lie == "Ready with v1, and llm-0 says d-v0"


def test_a_node_that_wrote_after_the_rollout_has_not_been_silent_before() -> None:
    """A tape begins with the latest word of each: the node's may be later than the rollout's."""
    story = Story()
    story.add("pod", "llm-0", pod(version="v1"))
    story.rollout("v1", ready=True)
    story.serves("v1", "d-v1")
    found = judge(story)  # type: ignore[arg-type]
    assert (found.lies, found.served) == ([], {"v1": 1})


def test_an_engine_that_confirms_nothing_makes_ready_a_lie() -> None:
    story = Story()
    story.serves("v1", "")
    story.rollout("v1", ready=True)
    assert judge(story).lies == ["Ready with v1, and llm-0 says nothing"]  # type: ignore[arg-type]
