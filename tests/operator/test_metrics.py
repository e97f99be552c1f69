"""What Prometheus is told of the ends of rollouts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_crds.weightversion import WeightVersionSpec, WeightVersionStatus
from hotweights_operator import revision
from hotweights_operator.cache import Cache
from hotweights_operator.metrics import Metrics, Pulse
from hotweights_operator.model import Version

BEGAN = datetime(2026, 1, 1, 12, tzinfo=UTC)
LATER = BEGAN + timedelta(seconds=40)


def version(name: str) -> Version:
    spec = WeightVersionSpec.from_dict({"model": "m", "version": name, "source": {"uri": f"file:///{name}"}})
    status = WeightVersionStatus(digest=f"sha256:{name}")
    return Version(f"uid-{name}", name, "models", 1, "1", spec, status)


def begun() -> WeightRolloutStatus:
    """A revision that began."""
    return revision.revised(WeightRolloutStatus(), version("v1"), BEGAN)


def test_a_revision_ends_once() -> None:
    done = revision.completed(begun(), LATER)
    assert revision.ended(begun(), done, LATER) == [("Complete", 40.0)]
    again = revision.completed(done, LATER)
    assert revision.ended(done, again, LATER) == []
    assert revision.ended(done, revision.revised(done, version("v2"), LATER), LATER) == []


def test_a_newer_version_supersedes() -> None:
    assert revision.ended(begun(), revision.revised(begun(), version("v2"), LATER), LATER) == [("Superseded", 40.0)]


def test_an_abort_counts_when_it_happens_and_not_when_it_is_followed() -> None:
    aborted = begun().model_copy(update={"aborted_revision": 1})
    assert revision.ended(begun(), aborted, LATER) == [("Aborted", 40.0)]
    followed = revision.revised(aborted, version("v2"), LATER + timedelta(hours=1))
    assert followed.history[0].outcome == "Aborted"
    assert revision.ended(aborted, followed, LATER + timedelta(hours=1)) == []


def test_the_ends_are_told_by_outcome() -> None:
    metrics = Metrics(Cache(), lambda: Pulse(0.0, 0, 0.0, True))
    metrics.ended("Complete", 4.0)
    metrics.ended("Aborted", 400.0)
    text = metrics.text().decode()
    assert 'hotweights_rollout_duration_seconds_bucket{le="5.0",outcome="Complete"} 1.0' in text
    assert 'hotweights_rollout_duration_seconds_bucket{le="180.0",outcome="Aborted"} 0.0' in text
    assert 'hotweights_rollout_duration_seconds_sum{outcome="Aborted"} 400.0' in text
