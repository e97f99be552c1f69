"""What the disk remembers survives kills, and nonsense on it harms nobody."""

from __future__ import annotations

import errno
import logging
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hotweights_agent.local.state_file import FORMAT, StateFile, StateFileNotWritten
from hotweights_agent.session.assignments import SavedAssignment
from hotweights_agent.staging.manifest_cache import ManifestCache
from hotweights_common import files
from hotweights_crds.nodeweights import PodAssignment
from hotweights_planner.header import TensorEntry
from hotweights_planner.manifest import build
from tests.agent.world import digest, item


def saved(uid: str, token: int = 1) -> SavedAssignment:
    return SavedAssignment(
        PodAssignment(uid=uid, name=uid, namespace="ns", token=token, digest=digest(1)), (item(1),)
    )


def read(path: Path) -> StateFile:
    file = StateFile(path)
    file.load()
    return file


def test_what_was_remembered_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "state" / "pods.json"
    file = read(path)
    file.save(saved("a"), saved("b"))
    file.save(saved("a", 2))
    file.forget("b", "never")
    assert read(path).pods == (saved("a", 2),)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nothing_new_writes_nothing(tmp_path: Path) -> None:
    file = read(tmp_path / "pods.json")
    file.save(saved("a"))
    before = (tmp_path / "pods.json").stat().st_ino
    file.save(saved("a"))
    file.forget("b")
    assert (tmp_path / "pods.json").stat().st_ino == before


def test_it_is_bounded_and_the_oldest_go(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "pods.json", max_pods=3)
    for number in range(6):
        file.save(saved(str(number)))
    file.save(saved("3", 9))
    assert [pod.uid for pod in read(tmp_path / "pods.json").pods] == ["4", "5", "3"]


def test_a_file_that_was_half_written_is_not_seen(tmp_path: Path) -> None:
    file = read(tmp_path / "pods.json")
    file.save(saved("a"))
    (tmp_path / "pods.new").write_text('{"format":')  # killed in the middle
    assert read(tmp_path / "pods.json").pods == (saved("a"),)


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.sampled_from([b"{}", b"[]", b"null", b"[" * 5000]),
        st.sampled_from(
            [
                f'{{"format":"{FORMAT}","pods":{p}}}'.encode()
                for p in ("[1]", "{}", '[{"stage":3}]', "[{}]")
            ]
        ),
    )
)
def test_a_corrupt_file_is_set_aside_with_a_word(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pods.json"
    path.write_bytes(content)
    file = read(path)
    assert file.pods == ()
    assert (tmp_path / "pods.corrupt").read_bytes() == content
    file.save(saved("a"))
    assert read(path).pods == (saved("a"),)


def test_the_word_says_what_it_means(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "pods.json").write_text("nonsense")
    with caplog.at_level(logging.ERROR):
        read(tmp_path / "pods.json")
    assert "set aside as pods.corrupt" in caplog.text
    assert "will wait" in caplog.text


def test_a_disk_that_takes_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file, not a folder")
    with pytest.raises(StateFileNotWritten, match="state_folder"):
        StateFile(tmp_path / "state" / "pods.json").save(saved("a"))


def test_what_a_full_disk_refused_is_written_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same assignment once more, and nothing said again."""
    path = tmp_path / "pods.json"
    file = read(path)
    file.save(saved("a"), saved("b"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(files, "replace", full)
        writes: list[Callable[[], None]] = [
            lambda: file.save(saved("a", 2)),
            lambda: file.forget("b"),
            file.retry,
        ]
        for write in writes:
            with pytest.raises(StateFileNotWritten, match="make room"):
                write()
    assert file.unwritten
    assert read(path).pods == (saved("a"), saved("b"))
    file.save(saved("a", 2))
    assert not file.unwritten
    assert read(path).pods == (saved("a", 2),)
    before = path.stat().st_ino
    file.retry()
    assert path.stat().st_ino == before


def test_kept_manifests_are_whole_or_not_used(tmp_path: Path) -> None:
    cache = ManifestCache(tmp_path / "manifests", max_files=2)
    entry = TensorEntry("w", "F32", (1,), 4, 100)
    manifests = [
        build("m", f"v{n}", {"model.safetensors": [entry]}, {"w": ["0" * 64]}) for n in range(3)
    ]
    for manifest in manifests:
        cache.put(manifest)
    assert cache.get(manifests[2].digest) == manifests[2]
    assert len(list((tmp_path / "manifests").glob("*.json"))) == 2
    path = tmp_path / "manifests" / f"{manifests[2].digest[7:]}.json"
    path.write_bytes(manifests[0].canonical)
    assert cache.get(manifests[2].digest) is None
