"""An agent that was killed finds its versions again: the same memory, nothing read or fetched."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from hotweights_agent.local import keeper, kept_memory
from hotweights_agent.local.kept_memory import KeptMemory, _connect
from hotweights_agent.staging.store import Store
from hotweights_planner.manifest import Manifest
from hotweights_storage.errors import NoCapacity
from hotweights_storage.image import Image
from hotweights_storage.resolve import publish
from hotweights_storage.slab import sealed_memfd
from hotweights_storage.sources.file import open_folder
from hotweights_storage.stage import stage_from_source

pytestmark = pytest.mark.timeout(180)  # keepers are processes

SECONDS = 60.0  # for a process to begin, to answer, to end, while the machine is busy


@contextmanager
def keeper_at(path: Path, *before: str) -> Iterator[None]:
    """A keeper that listens, as a process of its own. Its answers are waited for as long as a busy
    machine takes.
    """
    command = [*before, sys.executable, "-m", "hotweights_agent.local.keeper", str(path)]
    with subprocess.Popen(command) as process, pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_memory, "ANSWER_SECONDS", SECONDS)
        try:
            _connect(path, SECONDS).close()
            yield
        finally:
            process.terminate()
            assert process.wait(SECONDS) == 0
            path.unlink()


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """The socket of a keeper."""
    with keeper_at(tmp_path / "keeper.sock"):
        yield tmp_path / "keeper.sock"


def checkpoint(folder: Path, seed: int) -> Path:
    """Two tensors of several chunks, one of them equal in every seed, and an empty one."""
    folder.mkdir()
    fixed, changing = numpy.random.default_rng(0), numpy.random.default_rng(seed)
    tensors = {
        "a": fixed.integers(0, 255, (9 << 20) + 5, dtype=numpy.uint8),
        "b": changing.integers(0, 255, (5 << 20) + 1, dtype=numpy.uint8),
        "none": numpy.zeros((0, 4), dtype=numpy.float32),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def stage(store: Store, folder: Path, version: str) -> Manifest:
    with open_folder(folder) as source:
        manifest = publish(source, "m", version)
        with store.begin(manifest) as staging:
            stage_from_source(source, staging.builder)
            staging.commit()
    return manifest


def content(image: Image) -> dict[str, bytes]:
    return {
        digest: os.pread(place.slab.fd, place.nbytes, place.offset)
        for digest, place in image.chunks.items()
    }


def inodes(image: Image) -> set[int]:
    return {os.fstat(slab.fd).st_ino for slab in image.slabs}


@pytest.fixture
def agent() -> Iterator[Callable[[Path | None], Store]]:
    """Opens a store as a node does."""
    opened: list[KeptMemory] = []

    def start(path: Path | None) -> Store:
        opened.append(KeptMemory(path))
        store = Store(keeper=opened[-1])
        for image in opened[-1].find():
            store.adopt(image)
        return store

    yield start
    for kept in opened:
        kept.close()


Agent = Callable[[Path | None], Store]


def test_what_was_staged_is_found_again_in_the_same_memory(
    agent: Agent, path: Path, tmp_path: Path
) -> None:
    first = agent(path)
    manifests = [
        stage(first, checkpoint(tmp_path / f"v{seed}", seed), f"v{seed}") for seed in (0, 1)
    ]
    before = []
    for manifest in manifests:
        with first.image(manifest.digest) as pin:
            before.append((content(pin), inodes(pin), pin.table_json))
    second = agent(path)  # the first one is gone, as far as the keeper can tell
    assert not second.versions(), "nobody has asked for them yet"
    for manifest, (chunks, memory, table) in zip(manifests, before, strict=True):
        with second.begin(manifest) as staging:
            assert staging.needed_nbytes == 0
            staging.commit()
        with second.image(manifest.digest) as pin:
            assert (content(pin), inodes(pin)) == (chunks, memory)
            assert pin.table_json == table
    memory = {inode for _, inodes, _ in before for inode in inodes}
    assert len(memory) < sum(len(inodes) for _, inodes, _ in before), "they share a slab"
    assert second.usage().held == first.usage().held, "what is found again counts"


def test_what_was_released_is_not_found(agent: Agent, path: Path, tmp_path: Path) -> None:
    first = agent(path)
    kept = stage(first, checkpoint(tmp_path / "v0", 0), "v0")
    gone = stage(first, checkpoint(tmp_path / "v1", 1), "v1")
    first.release(gone.digest)
    assert first.settle()
    kept_memory = KeptMemory(path)
    found = kept_memory.find()
    kept_memory.close()
    assert [image.manifest.digest for image in found] == [kept.digest]
    for image in found:
        image.close()


def test_what_was_found_and_not_staged_to_the_end_is_found_again(
    agent: Agent, path: Path, tmp_path: Path
) -> None:
    """An agent that is stopped again in between, or whose staging was called off."""
    manifest = stage(agent(path), checkpoint(tmp_path / "v0", 0), "v0")
    second = agent(path)
    with second.begin(manifest):
        pass
    assert second.settle()
    third = agent(path)
    with third.begin(manifest) as staging:
        assert staging.needed_nbytes == 0


def test_what_a_stopped_agent_lets_go_of_stays_kept(path: Path, tmp_path: Path) -> None:
    kept = KeptMemory(path)
    store = Store(keeper=kept)
    manifest = stage(store, checkpoint(tmp_path / "v0", 0), "v0")
    kept.close()
    store.release(manifest.digest)
    assert store.settle()
    after = KeptMemory(path)
    (image,) = after.find()
    assert image.manifest.digest == manifest.digest
    image.close()
    after.close()


def test_what_made_room_after_a_restart_is_not_kept_any_longer(
    agent: Agent, path: Path, tmp_path: Path
) -> None:
    stage(agent(path), checkpoint(tmp_path / "v0", 0), "v0")
    kept = KeptMemory(path)
    second = Store(keeper=kept, available=lambda: 0)
    for image in kept.find():
        second.adopt(image)
    with pytest.raises(NoCapacity):
        stage(second, checkpoint(tmp_path / "v1", 1), "v1")
    assert second.usage().held == 0, "v0 was thrown away for it"
    assert second.settle()
    kept.close()
    third = KeptMemory(path)
    assert third.find() == [], "nobody else holds its memory"
    third.close()


def test_without_a_keeper_an_agent_goes_on(
    agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotweights_agent.local.kept_memory.CONNECT_SECONDS", 0.0)
    for path in (None, tmp_path / "nobody.sock"):
        store = agent(path)
        manifest = stage(store, checkpoint(tmp_path / f"of-{bool(path)}", 0), "v0")
        assert store.release(manifest.digest)


def test_a_keeper_that_ends_costs_the_agent_nothing(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kept = KeptMemory(tmp_path)
    kept._sock = ours
    theirs.close()
    store = Store(keeper=kept)
    manifest = stage(store, checkpoint(tmp_path / "v0", 0), "v0")
    assert store.release(manifest.digest)


def test_it_holds_more_slabs_than_a_shell_s_limit(tmp_path: Path) -> None:
    """containerd 2 gives a process 1,024 descriptors where it asks for no more; here it is 64."""
    path, memory = tmp_path / "keeper.sock", sealed_memfd(b"slab", "slab")
    names = [str(number) for number in range(200)]
    with (
        keeper_at(path, "sh", "-c", 'ulimit -Sn 64 && exec "$@"', "sh"),
        _connect(path, SECONDS) as sock,
    ):
        keeper.send(sock, {"op": "slabs", "names": names}, [memory.fd] * 200)
        keeper.send(sock, {"op": "keep", "image": "x", "slabs": names}, [memory.fd] * 2)
        assert keeper.receive(sock) == ({"op": "kept"}, [])
        keeper.send(sock, {"op": "list"})
        answer = keeper.receive(sock)
        assert answer is not None
        keeper.close_all(answer[1])
        assert len(answer[1]) == 200
    memory.release()


def test_a_keeper_that_comes_late_or_begins_anew_gets_all_that_is_staged(
    agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keeper.sock"
    with monkeypatch.context() as patch:
        patch.setattr("hotweights_agent.local.kept_memory.CONNECT_SECONDS", 0.0)
        first = agent(path)  # nobody is there yet
    early = stage(first, checkpoint(tmp_path / "v0", 0), "v0")
    gone = stage(first, checkpoint(tmp_path / "v1", 1), "v1")
    first.release(gone.digest)
    assert first.settle()
    staged = {early.digest}
    for seed in (2, 3):  # the second keeper is another process, with nothing
        with keeper_at(path):
            staged.add(stage(first, checkpoint(tmp_path / f"v{seed}", seed), f"v{seed}").digest)
            found = KeptMemory(path)
            images = found.find()
            assert {image.manifest.digest for image in images} == staged
            for image in images:
                image.close()
            found.close()


@pytest.mark.parametrize(
    "message",
    [
        {"op": "slabs", "names": ["one", "two"]},
        {"op": "keep", "image": "x", "slabs": ["unheard-of"]},
        {"op": "keep", "image": "x"},
        {"op": "unheard-of"},
        {"no": "op"},
    ],
)
def test_nonsense_costs_the_connection_and_no_descriptor(
    message: dict[str, object], tmp_path: Path
) -> None:
    keeping = keeper.Keeper()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = tmp_path / "file"  # of nobody else: what other tests left may be closed meanwhile
    with ours, theirs, path.open("w") as file:
        keeper.send(ours, message, [file.fileno()])
        assert not keeper._answers(theirs, keeping)
        links = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]  # noqa: PTH208
        assert [link.name for link in links if link.exists() and link.samefile(path)] == [
            str(file.fileno())
        ]


def test_memory_that_is_not_sealed_is_not_believed(
    agent: Agent, path: Path, tmp_path: Path
) -> None:
    store = agent(path)
    stage(store, checkpoint(tmp_path / "v0", 0), "v0")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(str(path))
        sock.settimeout(SECONDS)
        open_memory = os.memfd_create("open", os.MFD_ALLOW_SEALING)
        keeper.send(sock, {"op": "slabs", "names": ["s"]}, [open_memory])
        keeper.send(sock, {"op": "keep", "image": "x", "slabs": ["s"]}, [open_memory] * 2)
        assert keeper.receive(sock) == ({"op": "kept"}, [])
        os.close(open_memory)
    kept = KeptMemory(path)
    (sound,) = kept.find()
    assert sound.manifest.version == "v0"
    sound.close()
    kept.close()
    again = KeptMemory(path)  # the other was let go of
    (sound,) = again.find()
    sound.close()
    again.close()


def test_a_version_that_moves_leaves_nothing_behind() -> None:
    """As when an older version is copied out of slabs that the newest one left."""
    held = keeper.Keeper()
    for number in range(3):
        slab = os.memfd_create(f"slab-{number}")
        others = [os.memfd_create("small"), os.memfd_create("small")]
        assert list(held.handle({"op": "slabs", "names": [f"s{number}"]}, [slab])) == []
        message = {"op": "keep", "image": "x", "slabs": [f"s{number}"]}
        assert list(held.handle(message, others)) == [({"op": "kept"}, ())]
    (slabs, fds), _, _ = held.handle({"op": "list"}, [])
    assert (slabs["names"], list(fds)) == (["s2"], [slab])
    assert list(held.handle({"op": "only", "images": []}, [])) == [({"op": "dropped"}, ())]
    assert list(held.handle({"op": "list"}, [])) == [({"op": "end"}, ())]
