"""Sources: what may be read, for whom, and that no link, name or file type leads anywhere else."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hotweights_storage.errors import SourceRefused, SourceUnavailable
from hotweights_storage.sources import folder as folders
from hotweights_storage.sources import safe_open
from hotweights_storage.sources.base import Root, Sources, read_small
from hotweights_storage.sources.file import ClaimOpener, FileOpener, open_folder
from hotweights_storage.sources.folder import FileSource


@pytest.fixture(params=["openat2", "walk"])
def root(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with a model in it, and a secret beside it; with the kernel's help and without."""
    if request.param == "walk":

        def missing(*_: object) -> int:
            raise PermissionError(1, "filtered")

        monkeypatch.setattr(safe_open, "_openat2", missing)
    folder = tmp_path / "models" / "my model"
    folder.mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    return tmp_path / "models"


def sources(root: Path, *namespaces: str) -> Sources:
    return Sources({
        "file": FileOpener([Root(root, namespaces or ("*",))]),
        "pvc": ClaimOpener([Root(root, ("team-a",), "weights")]),
    })  # fmt: skip


def reason_of(
    call: Callable[[], object], kind: type[SourceRefused | SourceUnavailable] = SourceRefused
) -> str:
    with pytest.raises(kind) as caught:
        call()
    return caught.value.reason


@pytest.mark.parametrize("spelling", ["my%20model", "my model", "./my model/"])
def test_a_path_with_spaces_is_read(root: Path, spelling: str) -> None:
    with sources(root).open(f"file://{root}/{spelling}", "any") as source:
        assert source.files() == {"a.safetensors": 25600}
        assert read_small(source, "a.safetensors", 4, 255) == b"\xff\x00\x01\x02"
        assert read_small(source, "a.safetensors", 100, 25590) == bytes(range(246, 256))
        assert read_small(source, "a.safetensors", 100, 99999) == b""


def test_a_root_is_open_to_its_namespaces(root: Path) -> None:
    uri = f"file://{root}/my%20model"
    sources(root, "team-a", "team-b").open(uri, "team-b").close()
    assert reason_of(lambda: sources(root, "team-a").open(uri, "team-b")) == "SourceNotAllowed"


def test_a_claim_belongs_to_its_namespace(root: Path) -> None:
    with sources(root).open("pvc://weights/my%20model", "team-a") as source:
        assert list(source.files()) == ["a.safetensors"]
    assert (
        reason_of(lambda: sources(root).open("pvc://weights/my%20model", "team-b"))
        == "SourceNotAllowed"
    )
    assert (
        reason_of(lambda: sources(root).open("pvc://other/my%20model", "team-a"))
        == "SourceNotAllowed"
    )


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("file:///etc", "SourceNotAllowed"),
        ("file://{root}2/x", "SourceNotAllowed"),
        ("file://{root}/../secret", "BadURI"),
        ("file://{root}/%2e%2e/secret", "BadURI"),
        ("file://{root}/my model%00", "BadURI"),
        ("file://{root}/my model?x=1", "BadURI"),
        ("file://{root}/my model#x", "BadURI"),
        ("file://host{root}/my model", "BadURI"),
        ("pvc://weights/../secret", "BadURI"),
        ("s3://bucket/x", "UnknownScheme"),
        ("/etc", "UnknownScheme"),
    ],
)
def test_uris_that_are_refused(root: Path, uri: str, reason: str) -> None:
    assert reason_of(lambda: sources(root).open(uri.format(root=root), "team-a")) == reason


def test_what_is_not_there_is_said_at_once(root: Path) -> None:
    opened = sources(root)
    assert (
        reason_of(lambda: opened.open(f"file://{root}/none", "x"), SourceUnavailable)
        == "SourceNotFound"
    )
    uri = f"file://{root}/my model/a.safetensors"
    assert reason_of(lambda: opened.open(uri, "x"), SourceUnavailable) == "SourceUnreadable"
    gone = Sources({"file": FileOpener([Root(root / "unmounted")])})
    assert (
        reason_of(lambda: gone.open(f"file://{root}/unmounted/m", "x"), SourceUnavailable)
        == "SourceNotFound"
    )


def test_a_folder_that_is_a_link_out_of_the_root_is_refused(root: Path) -> None:
    (root / "absolute").symlink_to(root.parent / "secret")
    (root / "relative").symlink_to("../secret")
    for name in ("absolute", "relative", "relative/.", "absolute/key"):
        reason = reason_of(partial(sources(root).open, f"file://{root}/{name}", "x"))
        assert reason == "SourceNotAllowed"


def test_a_file_that_is_a_link_out_of_the_root_is_refused(root: Path) -> None:
    (root / "my model" / "key.safetensors").symlink_to("../../secret/key")
    with sources(root).open(f"file://{root}/my model", "x") as source:
        assert list(source.files()) == ["a.safetensors"]
        assert isinstance(source.entries()["key.safetensors"], SourceRefused)
        assert reason_of(lambda: read_small(source, "key.safetensors", 6)) == "SourceNotAllowed"


def test_a_link_put_there_later_is_refused(root: Path) -> None:
    with sources(root).open(f"file://{root}/my model", "x") as source:
        (root / "my model" / "a.safetensors").unlink()
        (root / "my model" / "a.safetensors").symlink_to("../../secret/key")
        assert reason_of(lambda: read_small(source, "a.safetensors", 6)) == "SourceNotAllowed"


def test_links_inside_the_root_are_followed_as_the_hugging_face_cache_needs(root: Path) -> None:
    (root / "blobs").mkdir()
    (root / "blobs" / "0a").write_bytes(b"weights")
    (root / "snapshot").mkdir()
    (root / "snapshot" / "m.safetensors").symlink_to("../blobs/0a")
    with sources(root).open(f"file://{root}/snapshot", "x") as source:
        assert source.files() == {"m.safetensors": 7}
        assert read_small(source, "m.safetensors", 7) == b"weights"


def test_what_cannot_be_followed_is_told_only_where_it_is_wanted(root: Path) -> None:
    folder = root / "my model"
    (folder / "loop").symlink_to("loop")
    (folder / "latest").symlink_to("nowhere")
    (folder / "README.md").symlink_to("a.safetensors/README.md")
    (folder / "LICENSE").symlink_to("../../secret/key")
    with sources(root).open(f"file://{folder}", "x") as source:
        assert source.files() == {"a.safetensors": 25600}
        broken = {
            name: error.reason
            for name, error in source.entries().items()
            if not isinstance(error, int)
        }
    assert broken == {
        "loop": "SourceUnreadable",
        "latest": "SourceNotFound",
        "README.md": "SourceUnreadable",
        "LICENSE": "SourceNotAllowed",
    }


def test_only_regular_files_are_read(root: Path) -> None:
    os.mkfifo(root / "my model" / "pipe.safetensors")
    (root / "my model" / "folder.safetensors").mkdir()
    with sources(root).open(f"file://{root}/my model", "x") as source:
        assert list(source.files()) == ["a.safetensors"]
        for name in ("pipe.safetensors", "folder.safetensors"):
            assert reason_of(lambda name=name: read_small(source, name, 1)) == "SourceNotAllowed"  # type: ignore[misc]


def open_below(folder: Path) -> list[Path]:
    """What this process has open there. All that it has open changes without us: other threads, and
    what is collected late.
    """
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(link.readlink())
    return [path for path in found if path.is_relative_to(folder)]


def test_every_descriptor_is_given_back(root: Path) -> None:
    with sources(root).open(f"file://{root}/my model", "x") as source:
        read_small(source, "a.safetensors", 1)
        assert open_below(root)
    assert not open_below(root)


def nested(root: Path) -> Sources:
    """A root of team-a with one of team-b in it."""
    inner = Root(root / "my model", ("team-b",))
    return Sources({"file": FileOpener([Root(root, ("team-a",)), inner])})


def test_a_root_in_another_is_its_own(root: Path) -> None:
    (root / "other").mkdir()
    both = nested(root)
    both.open(f"file://{root}/my model", "team-b").close()
    both.open(f"file://{root}/other", "team-a").close()
    for path, namespace in (("my model", "team-a"), ("other", "team-b")):
        assert reason_of(partial(both.open, f"file://{root}/{path}", namespace)) == (
            "SourceNotAllowed"
        )


def test_no_link_leads_into_another_s_root(root: Path) -> None:
    (root / "link").symlink_to("my model")
    (root / "other").mkdir()
    (root / "other" / "a.safetensors").symlink_to("../my model/a.safetensors")
    assert reason_of(partial(nested(root).open, f"file://{root}/link", "team-a")) == (
        "SourceNotAllowed"
    )
    with nested(root).open(f"file://{root}/other", "team-a") as source:
        wanted = partial(source.read_into, "a.safetensors", 0, memoryview(bytearray(1)))
        assert reason_of(wanted) == "SourceNotAllowed"


def test_one_root_may_be_named_for_several_namespaces(root: Path) -> None:
    twice = Sources({"file": FileOpener([Root(root, ("team-a",)), Root(root, ("team-b",))])})
    for namespace in ("team-a", "team-b"):
        twice.open(f"file://{root}/my model", namespace).close()


@pytest.mark.parametrize("direct", [True, False])
def test_direct_and_cached_reads_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    content = os.urandom(3 * 4096 + 77)
    (tmp_path / "a").write_bytes(content)
    monkeypatch.setattr(folders, "_is_cached", lambda *_: not direct)
    buffer = mmap.mmap(-1, 4 * 4096)
    with open_folder(tmp_path) as source, memoryview(buffer) as view:
        for _ in range(20):  # past the trials of the contest
            assert source.read_into("a", 4096, view) == 2 * 4096 + 77
            assert view[: 2 * 4096 + 77] == content[4096:]
        with view[3:103] as piece:  # what direct reads cannot do
            assert source.read_into("a", 5, piece) == 100
            assert piece == content[5:105]


def test_the_cache_is_used_only_where_it_is_far_quicker() -> None:
    for seconds_direct, direct in ((1.0, True), (1.9, True), (3.0, False)):
        contest = folders._FasterRead()
        for _ in range(8):
            kind = contest.direct()
            contest.count(kind, 1 << 20, seconds_direct if kind else 1.0)
        assert contest.direct() is direct


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    os.utime(tmp_path / "a", (1, 1))
    with open_folder(tmp_path) as source:
        read_small(source, "a", 3)
        source.check_unchanged()
        (tmp_path / "new").write_bytes(b"new")
        (tmp_path / "new").replace(tmp_path / "a")
        assert reason_of(source.check_unchanged, SourceUnavailable) == "SourceChanged"


def test_another_inode_is_no_other_file(tmp_path: Path) -> None:
    """gcsfuse, s3 mounts and others give a file a new one when their cache goes."""
    (tmp_path / "a").write_bytes(b"same")
    os.utime(tmp_path / "a", (1, 1))
    with open_folder(tmp_path) as source:
        read_small(source, "a", 4)
        shutil.copy2(tmp_path / "a", tmp_path / "b")
        (tmp_path / "b").replace(tmp_path / "a")
        source.check_unchanged()


class Stale:
    """A network file system that forgets, once each, the handle of a file and of a name."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self.names = {"a"}
        self.reads = 0  # that are still answered with ESTALE
        real = folders._read

        def read(*arguments: Any) -> int:
            if self.reads:
                self.reads -= 1
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return real(*arguments)

        monkeypatch.setattr(folders, "_read", read)

    def open(self, name: str, flags: int) -> int:
        if name in self.names:
            self.names.remove(name)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return os.open(self._folder / (name or "."), flags)


def test_a_stale_handle_is_asked_for_anew_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"same")
    os.utime(tmp_path / "a", (1, 1))
    stale = Stale(tmp_path, monkeypatch)
    with FileSource("file:///nfs", stale.open) as source:
        assert source.files() == {"a": 4}
        stale.reads = 1
        assert read_small(source, "a", 4) == b"same"
        source.check_unchanged()
        stale.reads = 2
        with pytest.raises(SourceUnavailable, match=os.strerror(errno.ESTALE)):
            read_small(source, "a", 4)
        os.utime(tmp_path / "a", (2, 2))  # it is stale because it was replaced
        stale.reads = 1
        assert reason_of(lambda: read_small(source, "a", 4), SourceUnavailable) == "SourceChanged"
    assert not open_below(tmp_path)


@pytest.fixture
def as_somebody() -> Iterator[None]:
    """Not root while the test runs: modes count."""
    if os.geteuid():
        yield  # modes count already
        return
    os.setegid(65534)
    os.seteuid(65534)
    yield
    os.seteuid(0)
    os.setegid(0)


def test_a_file_that_may_not_be_read_is_told_with_owner_mode_and_remedy(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "a").write_bytes(b"secret")
    (tmp_path / "a").chmod(0o600 if os.geteuid() == 0 else 0)
    (tmp_path / "b").write_bytes(b"open")
    (tmp_path / "b").chmod(0o644)
    tmp_path.chmod(0o755)
    fd = os.open(tmp_path, os.O_PATH)  # the folders above are the test run's own
    request.getfixturevalue("as_somebody")
    with FileSource("file:///m", lambda name, flags: os.open(name or ".", flags, dir_fd=fd)) as it:
        assert it.files() == {"a": 6, "b": 4}
        assert read_small(it, "b", 4) == b"open"
        with pytest.raises(SourceUnavailable) as caught:
            read_small(it, "a", 6)
    os.close(fd)
    assert caught.value.reason == "SourceUnreadable"
    text = str(caught.value)
    assert "a: Permission denied: it has mode 0" in text
    assert f"and this process is user {os.geteuid()}" in text
    assert "let everybody read it: chmod -R a+r" in text


def test_a_folder_of_ones_own_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SourceUnavailable, match="is not a folder"):
        open_folder(tmp_path / "file")
    with pytest.raises(SourceUnavailable, match="does not exist"):
        open_folder(tmp_path / "none")
