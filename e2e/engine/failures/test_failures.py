"""Every row of the table of failures, on a real engine: afterwards it serves the old version right, or
nothing; what it says of itself is so; and the next good version gets in.

The rows share an engine as long as one lives. Each begins with whatever it serves.
"""

from __future__ import annotations

import resource
import urllib.error
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from e2e.engine import images
from e2e.engine.agent import Gone
from e2e.engine.conftest import Engine, golden
from e2e.engine.failures.pod import Pod
from e2e.engine.failures.table import FAILURES, PREPARE, REPAIR, Failure, Outcome
from e2e.engine.images import Image
from hotweights_transports.handoff import frames

LIVING = [failure for failure in FAILURES if not failure.outcome.is_fatal]
FATAL = [failure for failure in FAILURES if failure.outcome.is_fatal]


@pytest.fixture(scope="module")
def pods() -> list[Pod]:
    """Those that were started; only the last may be alive."""
    return []


@pytest.fixture
def pod(
    start: Callable[..., Engine], pods: list[Pod], models: list[Path], versions: list[Image]
) -> Pod:
    """One that is alive, and serves a version that has a name."""
    if not pods or not pods[-1].engine.vllm.alive():
        engine = start(models[0], HOTWEIGHTS_PREPARE_SHARE="1", VLLM_SERVER_DEV_MODE="1").ready()
        engine.agent.swap(versions[0])
        pods.append(Pod(engine, models, versions))
    pods[-1].begin()
    return pods[-1]


@pytest.mark.parametrize("failure", LIVING, ids=lambda failure: failure.name)
def test_it_serves_what_it_says_and_takes_the_next_version(pod: Pod, failure: Failure) -> None:
    said = len(pod.engine.states())
    with pod.used() as answers:
        if failure in PREPARE:
            _fail_to_prepare(pod, failure)
        else:
            _fail_to_commit(pod, failure, said)
    if failure.outcome in (Outcome.SERVED, Outcome.TOLD_LATER):
        pod.serves = 1 - pod.serves
    elif not failure.opened:
        # the request began with the old version, and nobody has ever served it another
        assert answers == [golden(pod.models[pod.serves])[0]["tokenIds"]]
    pod.assert_right()
    assert {state.digest for state in pod.engine.states()[said:]} <= {pod.old.digest}
    pod.take_the_new()


@pytest.mark.parametrize("failure", FATAL, ids=lambda failure: failure.name)
def test_what_cannot_serve_right_ends(pod: Pod, failure: Failure) -> None:
    server = pod.engine.agent.peers["server"]
    said = len(server.states)
    with pod.used() as answers, suppress(Gone):  # it may be gone before it can say anything
        if failure in PREPARE:
            _break(pod, failure)
            pod.engine.agent.prepare(pod.new)
            raise AssertionError("it has prepared")
        _refused(_play_commit(pod, failure), failure.reason or "CommitFailed", dirty=True)
    code = pod.engine.vllm.process.wait(180)
    assert failure.outcome is Outcome.DIED or code == 1
    assert all(answer == golden(pod.models[pod.serves])[0]["tokenIds"] for answer in answers)
    assert {state.digest for state in server.states[said:]} <= {pod.old.digest}
    with pytest.raises(urllib.error.URLError):
        pod.engine.vllm.get("/health")


# --- a prepare ---------------------------------------------------------------------------------


def _fail_to_prepare(pod: Pod, failure: Failure) -> None:
    _break(pod, failure)
    if failure.outcome is Outcome.UNANSWERED:
        UNANSWERED[failure.by_agent](pod)
        return
    (answer,) = PREPARES.get(failure.by_agent, _prepare)(pod)
    assert isinstance(answer, frames.Rejected), answer
    assert answer.reason == failure.reason, answer
    late = pod.engine.agent.commit(pod.new.digest)
    _refused(late, "NotPrepared", dirty=False)


def _prepare(pod: Pod) -> list[frames.Frame]:
    return pod.engine.agent.prepare(pod.new)


def _leave_a_slab_open(pod: Pod) -> list[frames.Frame]:
    opened = images.sealed(b"\0" * 4096, seals=0)
    return pod.engine.agent.prepare(Image(pod.new.digest, {}, [pod.new.fds[0], opened]))


def _announce_one_more(pod: Pod) -> None:
    sent = pod.engine.agent.start_prepare(pod.new, len(pod.new.fds))
    pod.engine.agent.down()
    hello = pod.reconnect()
    assert (hello.state, hello.digest) == ("Serving", pod.old.digest)
    _unanswered(pod, sent)
    _refused(pod.engine.agent.commit(pod.new.digest), "NotPrepared", dirty=False)


def _take_the_ranks_files(pod: Pod) -> list[frames.Frame]:
    """The limit is a running process's; what it has open, it keeps (prlimit(2))."""
    (worker,) = pod.engine.vllm.workers()
    opened = {int(path.name) for path in Path(f"/proc/{worker}/fd").iterdir()}
    first_free = next(number for number in range(len(opened) + 1) if number not in opened)
    soft, hard = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (first_free, hard))
    try:
        return _prepare(pod)
    finally:
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (soft, hard))


def _go_while_it_loads(pod: Pod) -> None:
    sent = pod.engine.agent.start_prepare(pod.new, len(pod.new.fds) - 1)
    pod.engine.agent.until(lambda: pod.engine.broke("load"), 120.0)
    pod.engine.agent.down()
    pod.engine.lets_go("load")
    hello = pod.reconnect()
    assert (hello.state, hello.digest) == ("Serving", pod.old.digest)
    _unanswered(pod, sent)


UNANSWERED: dict[str, Callable[[Pod], None]] = {
    "announce one more": _announce_one_more,
    "go": _go_while_it_loads,
}
PREPARES: dict[str, Callable[[Pod], list[frames.Frame]]] = {
    "take the rank's files": _take_the_ranks_files,
    "leave a slab open": _leave_a_slab_open,
}


def _unanswered(pod: Pod, sent: list[tuple[int, frames.Prepare]]) -> None:
    assert sent
    for rank, frame in sent:
        assert frame.id not in pod.engine.agent.peers[rank].answers


# --- a commit, and the repair after it ---------------------------------------------------------


def _fail_to_commit(pod: Pod, failure: Failure, said: int) -> None:
    if failure.outcome is Outcome.TOLD_LATER:
        _go_before_the_answer(pod, failure)
        return
    answer = _play_commit(pod, failure)
    if failure.outcome is Outcome.SERVED:
        assert isinstance(answer, frames.Committed), answer
        assert answer.probe == "Golden"
    else:
        _refused(answer, failure.reason, dirty=failure.outcome is Outcome.REPAIRED)
    if failure.outcome is Outcome.REPAIRED:
        assert pod.engine.repaired(said).digest == pod.old.digest
    assert not pod.engine.order.exists(), "the copy was never broken"
    assert all(map(pod.engine.broke, failure.orders)), "something was never broken"


def _play_commit(pod: Pod, failure: Failure) -> frames.Frame:
    """Prepare, and commit into the failure; what is answered."""
    if failure.by_agent != "prepare nothing":
        wish: dict[str, Any] = {"memory": failure.way, "max_pause_seconds": 60.0}
        (prepared,) = pod.engine.agent.prepare(pod.new, **(wish if failure.way else {}))
        assert isinstance(prepared, frames.Prepared), prepared
        assert failure.way in ("", prepared.way)
    if failure in REPAIR:
        return _commit_and_break_the_repair(pod, failure)
    _break(pod, failure)
    if not failure.held:
        return pod.engine.agent.commit(pod.new.digest)
    # these have a limit of their own
    deadline_seconds = 60.0 if failure.held in ("resume", "settle") else 1.0
    answer = pod.engine.agent.commit(pod.new.digest, deadline_seconds=deadline_seconds)
    # on a busy machine the deadline may pass before that step: nothing has happened then
    while (
        isinstance(answer, frames.CommitFailed)
        and not answer.dirty
        and not pod.engine.broke(failure.held)
    ):
        deadline_seconds *= 2
        answer = pod.engine.agent.commit(pod.new.digest, deadline_seconds=deadline_seconds)
    pod.engine.agent.until(lambda: pod.engine.broke(failure.held), 120.0)
    pod.engine.lets_go(failure.held)
    return answer


def _commit_and_break_the_repair(pod: Pod, failure: Failure) -> frames.Frame:
    """What is to break in the repair must not do so in the commit before: that is held meanwhile."""
    pod.engine.breaks("install", "hold")
    frame = pod.engine.agent.start_commit(pod.new.digest)
    pod.engine.agent.until(lambda: pod.engine.broke("install"), 120.0)
    _break(pod, failure)
    pod.engine.lets_go("install")
    return pod.engine.agent.answer_of(frame)


def _go_before_the_answer(pod: Pod, failure: Failure) -> None:
    new = pod.new.digest
    (prepared,) = pod.engine.agent.prepare(pod.new)
    assert isinstance(prepared, frames.Prepared), prepared
    _break(pod, failure)
    pod.engine.agent.start_commit(new)
    pod.engine.agent.until(lambda: pod.engine.broke(failure.held), 120.0)
    pod.engine.agent.down()
    assert pod.reconnect().digest == pod.old.digest, "it is not confirmed yet"
    pod.engine.lets_go(failure.held)
    # a new connection hears it as soon as it is so; one that comes later, in its hello
    pod.engine.agent.until(lambda: [s.digest for s in pod.engine.states()] == [new], 120.0)
    pod.engine.agent.down()
    assert pod.reconnect().digest == new


def _break(pod: Pod, failure: Failure) -> None:
    for step, deed in failure.orders.items():
        if step == "copy":
            pod.engine.order.write_text(deed)
        else:
            pod.engine.breaks(step, deed)


def _refused(answer: frames.Frame, reason: str, *, dirty: bool) -> None:
    assert isinstance(answer, frames.CommitFailed), answer
    assert (answer.reason, answer.dirty) == (reason, dirty), answer
