"""What is stable, what is held, what one could go back to: three things, and never what was not
complete.
"""

from __future__ import annotations

from dataclasses import replace

from hotweights_crds.weightrollout import VersionStatus
from hotweights_operator.decide import revision
from hotweights_operator.decide.rollouts import decide
from tests.operator.worlds import (
    AT_NEW,
    BACK,
    NEW,
    NOW,
    OLD,
    OTHER,
    REVISION,
    engine,
    pod,
    rollout,
    state,
    status_of,
    told,
    version,
    world,
)


def test_what_never_was_complete_is_never_stable_and_never_previous() -> None:
    new, old, other = version("new", NEW), version("old", OLD), version("other", OTHER)
    at_new = rollout(AT_NEW)
    back = revision.revised(at_new, old, NOW)
    assert (back.target.digest, back.stable.digest, back.previous.digest) == (OLD, OLD, "")
    assert [v.digest for v in back.held] == [NEW]
    further = revision.revised(replace(at_new, status=back), other, NOW)
    assert (further.target.digest, further.stable.digest, further.previous.digest) == (
        OTHER,
        OLD,
        OLD,
    )
    assert [v.digest for v in revision.kept(further)] == [OTHER, OLD]
    forth = revision.revised(replace(at_new, status=back), new, NOW)
    assert (forth.target.digest, forth.stable.digest) == (NEW, OLD)


def test_what_was_complete_is_kept_for_the_way_back() -> None:
    done = revision.completed(rollout(AT_NEW).status, NOW)
    assert (done.stable.digest, done.previous.digest) == (NEW, OLD)
    assert [v.digest for v in revision.kept(done)] == [NEW, OLD]
    assert revision.completed(done, NOW) == done


def test_setting_a_complete_version_back_keeps_it_staged() -> None:
    done = {
        **AT_NEW,
        "history": [{"revision": 2, "version": "new", "outcome": "Complete"}],
        "stable": AT_NEW["target"],
    }
    back = rollout(done, versionRef={"name": "old"})
    seen = world([pod(0, shows=NEW)], [state("n0", [engine(0, NEW)], {"p0": NEW})])
    status = status_of(decide(back, seen, NOW))
    assert (status.revision, status.target.digest, status.previous.digest) == (3, OLD, NEW)
    assert (status.stable.digest, status.history[0].outcome) == (NEW, "Complete")


def test_a_status_of_an_earlier_release_tells_what_is_stable() -> None:
    before = {k: v for k, v in AT_NEW.items() if k != "stable"}
    assert revision.stable(rollout(before).status) == VersionStatus(
        name="old", version="old", digest=OLD
    )
    done = {**before, "history": [{"revision": 2, "version": "new", "outcome": "Complete"}]}
    assert revision.stable(rollout(done).status).digest == NEW


def test_new_pods_get_what_is_stable_while_a_rollback_is_paused() -> None:
    back = rollout(
        {**BACK, "stable": {"digest": OLD}, "held": [{"digest": NEW}]},
        paused=True,
        versionRef={"name": "old"},
    )
    fresh = pod(1, ready=False, was_ready=False, gate=False)
    assert told(decide(back, world([fresh], [state("n0", [], {"p0": NEW})]), NOW))["p1"] == OLD


def test_a_retry_of_a_way_back_is_one() -> None:
    aborted = {
        **AT_NEW,
        "target": AT_NEW["previous"],
        "stable": AT_NEW["target"],
        "previous": AT_NEW["target"],
        "goesBack": True,
    }
    known = replace(
        rollout({**aborted, "abortedRevision": REVISION}, versionRef={"name": "old"}), retry="again"
    )
    seen = world([pod(0, shows=NEW)], [state("n0", [engine(0, NEW)], {"p0": NEW})])
    status = status_of(decide(known, seen, NOW))
    assert (status.revision, status.goes_back) == (REVISION + 1, True)
