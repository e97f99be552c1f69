"""``hotweights plan``, ``verify-plan`` and their calculators as a user runs them: real files, exit
codes, one clear line.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from hotweights.device_memory import Free, suggested_bucket_nbytes
from hotweights.home import HOME_VARIABLE
from hotweights.published import read_published
from hotweights_planner.manifest import CHUNK_NBYTES, FILE_NAME
from hotweights_planner.plan import parse
from hotweights_storage.sources.base import Root
from hotweights_storage.sources.file import FileOpener
from tests.coordinator.running import running
from tests.hotweights.command_line import Done, Run

WHOLE = bytes(range(256)) * (CHUNK_NBYTES // 256)


def write(folder: Path, tensors: dict[str, tuple[str, bytes]]) -> None:
    folder.mkdir(parents=True)
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, content) in tensors.items():
        shape = [len(content) // (2 if dtype == "F16" else 1)]
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> Path:
    """A folder with a blank and an umlaut in its name, and in it two versions of a model and their
    manifests.
    """
    here = tmp_path / "my mödels"
    write(
        here / "ckpt_a",
        {"w": ("U8", WHOLE + b"old"), "gone": ("U8", b"gone"), "typed": ("U8", b"same")},
    )
    write(here / "ckpt_b", {"w": ("U8", WHOLE + b"new"), "typed": ("F16", b"same")})
    monkeypatch.chdir(here)
    for name in (
        "HOTWEIGHTS_COORD",
        "HOTWEIGHTS_COORD_TOKEN",
        "HOTWEIGHTS_GROUP_MAP",
        "HOTWEIGHTS_TP_GROUPS",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    for version, letter, name in (("v0", "a", "prev"), ("v1", "b", "next")):
        checkpoint = ("--checkpoint", f"./ckpt_{letter}", "--model", "demo", "--version", version)
        assert run("publish", *checkpoint, "--output", f"m_{name}.json").returncode == 0
    return here


def failed(done: Done, text: str) -> None:
    assert done.returncode == 1
    assert text in done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr


def test_what_changed_is_planned(run: Run, here: Path) -> None:
    done = run(
        "plan",
        "--prev",
        "m_prev.json",
        "--next",
        "m_next.json",
        "--bucket-mb",
        64,
        "--output",
        "plan.json",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == (
        "Planned demo v1 from v0 (m_prev.json): 1 of 3 chunks, 3 B to move, 4.2 MB unchanged, "
        "1 tensor gone"
    )
    assert done.stderr.splitlines() == [
        "warning: 1 tensors of v0 are gone: gone",
        "warning: tensor typed was U8 [4] and is F16 [2] with the same bytes",
    ]
    plan = parse((here / "plan.json").read_bytes())
    assert (plan.base_version, plan.version, plan.removed) == ("v0", "v1", ("gone",))
    assert plan.digest in done.stdout
    document = json.loads((here / "plan.json").read_bytes())
    assert document["verification"]["digest"] == plan.digest
    assert {
        item["key"]: item["tensor"] for bucket in document["buckets"] for item in bucket["items"]
    } == {"w:1": "w"}
    assert run("verify-plan", "--plan", "plan.json", "--prev", "m_prev.json").returncode == 0


def test_the_source_is_a_uri_that_leads_back(run: Run, here: Path) -> None:
    published = read_published(here / "m_next.json")
    assert published.source is not None
    assert "my%20m%C3%B6dels" in published.source
    assert run("plan", "--next", "m_next.json").returncode == 0
    plan = parse((here / "transfer.plan.json").read_bytes())
    assert plan.source == published.source
    with FileOpener([Root(here)]).open(plan.source, "") as source:
        assert "model.safetensors" in source.files()
    assert run("manifest", "verify", "ckpt_b", "--manifest", "m_next.json").returncode == 0


def test_beside_the_weights_no_path_is_written(run: Run, here: Path) -> None:
    names = ("--model", "demo", "--version", "v1")
    assert run("publish", "--checkpoint", "ckpt_b", *names).returncode == 0
    inside = read_published(here / "ckpt_b" / FILE_NAME)
    assert inside.source is None
    assert inside.manifest.digest == read_published(here / "m_next.json").manifest.digest
    assert (
        run("publish", "--checkpoint", "ckpt_b", *names, "--output", "again.json").returncode == 0
    )
    assert (here / "again.json").read_bytes() == (here / "m_next.json").read_bytes()
    assert run("plan", "--next", f"ckpt_b/{FILE_NAME}").returncode == 0
    assert parse((here / "transfer.plan.json").read_bytes()).source == (here / "ckpt_b").as_uri()
    (here / "copied.json").write_bytes((here / "ckpt_b" / FILE_NAME).read_bytes())
    failed(run("plan", "--next", "copied.json"), "name the folder with --source")
    assert run("plan", "--next", "copied.json", "--source", "pvc://claim/ckpt_b").returncode == 0


@pytest.mark.parametrize("nothing", [None, b"[]", b" {}\n", b'{"tensors": []}'], ids=str)
def test_without_a_previous_version_everything_moves(
    run: Run, here: Path, nothing: bytes | None
) -> None:
    arguments: tuple[str, ...] = ()
    if nothing is not None:
        (here / "empty.json").write_bytes(nothing)
        arguments = ("--prev", "empty.json")
    done = run("plan", *arguments, "--next", "m_next.json", "--output", "plan.json")
    assert done.returncode == 0, done.stderr
    assert "from nothing" in done.stdout
    assert (
        "no previous manifest" if nothing is None else "empty.json has no tensors"
    ) in done.stdout
    plan = parse((here / "plan.json").read_bytes())
    assert (plan.base_version, plan.unchanged_nbytes) == (None, 0)
    assert plan.total_nbytes == plan.manifest.nbytes


def test_what_this_host_committed_last_is_the_previous_version(run: Run, here: Path) -> None:
    home = here.parent / "home"
    home.mkdir()
    (home / "current_manifest.json").write_bytes(
        read_published(here / "m_prev.json").manifest.canonical
    )
    done = run("plan", "--next", "m_next.json")
    assert f"from v0 ({home / 'current_manifest.json'})" in done.stdout


def test_what_this_host_committed_last_may_be_of_another_model(run: Run, here: Path) -> None:
    home = here.parent / "home"
    home.mkdir()
    other = run(
        "publish",
        "--checkpoint",
        "./ckpt_a",
        "--model",
        "other",
        "--version",
        "v0",
        "--output",
        "m_other.json",
    )
    assert other.returncode == 0
    (home / "current_manifest.json").write_bytes(
        read_published(here / "m_other.json").manifest.canonical
    )
    done = run("plan", "--next", "m_next.json")
    assert done.returncode == 0
    assert (
        f"from nothing ({home / 'current_manifest.json'} is of another model, other)" in done.stdout
    )
    failed(run("plan", "--prev", "m_other.json", "--next", "m_next.json"), "another model")


def test_the_coordinators_current_manifest_is_the_previous_version(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running() as coordinator:
        monkeypatch.setenv("HOTWEIGHTS_COORD", coordinator.endpoint)
        done = run("plan", "--next", "m_next.json")
        assert "from nothing (the coordinator at tcp://" in done.stdout, done.stderr
        with coordinator.client() as client:
            client.call(
                "set_current_manifest",
                binary=read_published(here / "m_prev.json").manifest.canonical,
            )
        assert "from v0 (the coordinator at tcp://" in run("plan", "--next", "m_next.json").stdout
        assert (
            "from nothing (" in run("plan", "--next", "m_next.json", "--coord-endpoint", "").stdout
        )


def test_a_coordinator_is_asked_with_what_it_wants(run: Run, here: Path) -> None:
    (here / "token").write_text("secret\n")
    assert run("coord-keys", here / "keys").returncode == 0
    current = read_published(here / "m_prev.json").manifest.canonical
    with running(token="secret", curve=here / "keys") as coordinator:
        with coordinator.client("secret", here / "keys") as client:
            client.call("set_current_manifest", binary=current)
        asked = (
            "plan",
            "--next",
            "m_next.json",
            "--coord-endpoint",
            coordinator.endpoint,
            "--curve",
            "keys",
        )
        failed(run(*asked), "wants a token; set $HOTWEIGHTS_COORD_TOKEN or name a --token-file")
        failed(run(*asked, "--token-file", "none"), "cannot read the token file none")
        failed(run(*asked, "--curve", "none", "--token-file", "token"), "cannot read the key none")
        assert not (here / "transfer.plan.json").exists()
        done = run(*asked, "--token-file", "token")
        assert "from v0 (the coordinator at tcp://" in done.stdout, done.stderr


def test_what_is_larger_than_a_bucket_is_split(run: Run, here: Path) -> None:
    assert run("plan", "--next", "m_next.json", "--bucket-mb", 1).returncode == 0
    plan = parse((here / "transfer.plan.json").read_bytes())
    assert max(bucket.nbytes for bucket in plan.buckets) == 1 << 20
    assert sum(item.is_part for bucket in plan.buckets for item in bucket.items) == 4


def test_models_that_are_named_after_their_folders_are_not_told_apart(run: Run, here: Path) -> None:
    for letter, name in (("a", "prev"), ("b", "next")):
        arguments = (
            "--checkpoint",
            f"./ckpt_{letter}",
            "--version",
            "v0",
            "--output",
            f"m_{name}.json",
        )
        assert run("publish", *arguments).returncode == 0
    done = run("plan", "--prev", "m_prev.json", "--next", "m_next.json")
    assert done.returncode == 0
    assert "warning: the previous version is named ckpt_a and this ckpt_b" in done.stderr
    failed(run("plan", "--prev", "m_prev.json", "--next", "m_next.json", "--strict"), "and 2 more")


def test_machines_get_one_object(run: Run, here: Path) -> None:
    done = run("plan", "--prev", "m_prev.json", "--next", "m_next.json", "--json")
    summary = json.loads(done.stdout)
    assert (summary["totalBytes"], summary["removed"], summary["baseVersion"]) == (
        3,
        ["gone"],
        "v0",
    )
    assert len(summary["warnings"]) == 2
    assert not done.stderr
    checked = json.loads(run("verify-plan", "--plan", summary["plan"], "--json").stdout)
    assert (checked["ok"], checked["digest"], checked["items"]) == (True, summary["digest"], 1)
    refused = run("plan", "--prev", "m_prev.json", "--next", "m_next.json", "--strict", "--json")
    assert refused.returncode == 1
    assert json.loads(refused.stdout)["error"]["reason"] == "BadPlan"


def test_a_plan_may_go_without_verification(run: Run, here: Path) -> None:
    assert run("plan", "--next", "m_next.json", "--no-verify").returncode == 0
    assert "verification" not in json.loads((here / "transfer.plan.json").read_bytes())


def test_group_0_is_a_group(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "map.json").write_text('{"w": 0}')
    monkeypatch.setenv("HOTWEIGHTS_TP_GROUPS", '{"0": [0, 1], "1": [2, 3]}')
    monkeypatch.setenv("HOTWEIGHTS_GROUP_MAP", "map.json")
    assert run("plan", "--next", "m_next.json").returncode == 0
    plan = parse((here / "transfer.plan.json").read_bytes())
    assert [bucket.consumers for bucket in plan.buckets] == [(0, 1), None]
    checked = ("verify-plan", "--plan", "transfer.plan.json")
    assert run(*checked, "--world-size", 2, "--enforce-tp-superset").returncode == 0
    failed(run(*checked, "--world-size", 1), "bucket 0 names ranks 1, and there are only 1")
    failed(run(*checked, "--require-consumers"), "bucket 1 has no consumer_ranks")
    monkeypatch.setenv("HOTWEIGHTS_TP_GROUPS", '{"0": [0, 1, 2]}')
    failed(
        run(*checked, "--enforce-tp-superset"),
        "bucket 0 goes to ranks 0, 1 of group 0 and not to all",
    )
    monkeypatch.delenv("HOTWEIGHTS_TP_GROUPS")
    failed(run("plan", "--next", "m_next.json"), "there is no tensor-parallel group 0")
    assert run(*checked, "--enforce-tp-superset").returncode == 2


def test_tensor_parallel_groups_are_made_and_checked(run: Run, here: Path) -> None:
    assert json.loads(run("tp-groups", "--world-size", 4, "--tp", 2).stdout) == {
        "0": [0, 1],
        "1": [2, 3],
    }
    assert run("tp-groups", "--world-size", 4, "--tp", 2, "--output", "tp.json").returncode == 0
    assert run("verify-tp", "--tp-groups", "tp.json", "--world-size", 4).returncode == 0
    failed(run("verify-tp", "--tp-groups", "tp.json", "--world-size", 5), "in no group: ranks [4]")
    failed(
        run("tp-groups", "--world-size", 5, "--tp", 2), "5 ranks cannot be divided into groups of 2"
    )
    failed(
        run("verify-tp", "--tp-groups", "none.json", "--world-size", 4), "none.json does not exist"
    )
    failed(run("verify-tp", "--tp-groups", '{"0": 1}', "--world-size", 4), "no list of ranks")
    found = json.loads(
        run("verify-tp", "--tp-groups", '{"0": [0]}', "--world-size", 1, "--json").stdout
    )
    assert found == {
        "ok": True,
        "groups": {"0": [0]},
        "world_size": 1,
        "problems": [],
        "warnings": [],
    }


@pytest.mark.parametrize(
    ("tool", "device", "bucket_mb"),
    [
        (None, "the host", None),
        ("echo 81000; echo 4000", "the smallest of 2 GPUs", 1000),
        ("echo 400", "the GPU", 100),
        ("echo no devices; exit 9", "the host", None),
    ],
)
def test_a_bucket_is_a_part_of_what_the_smallest_device_has_free(
    run: Run,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    tool: str | None,
    device: str,
    bucket_mb: int | None,
) -> None:
    (here / "bin").mkdir()
    if tool is not None:
        (here / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\n{tool}\n")
        (here / "bin" / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(here / "bin"))
    done = run("bucket-suggest", "--alpha", 0.25)
    assert device in done.stderr
    assert 1 <= int(done.stdout) <= 1024
    assert bucket_mb is None or int(done.stdout) == bucket_mb
    planned = run("plan", "--next", "m_next.json", "--auto", "--alpha", 0.25)
    assert device in planned.stdout
    if bucket_mb is not None:
        assert parse((here / "transfer.plan.json").read_bytes()).bucket_nbytes == bucket_mb << 20


@pytest.mark.usefixtures("here")
def test_a_coordinator_is_named_as_by_the_other_commands(run: Run) -> None:
    done = run("plan", "--next", "m_next.json", "--endpoint", "nonsense")
    assert (done.returncode, "'nonsense' is no endpoint" in done.stderr) == (1, True)


def test_a_suggestion_stays_within_bounds() -> None:
    assert suggested_bucket_nbytes(0.25, Free(0, "x")) == 1 << 20
    assert suggested_bucket_nbytes(0.25, Free(1 << 50, "x")) == 1 << 30


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--next", "none.json"), "none.json does not exist; write it with `hotweights publish`"),
        (("--next", "ckpt_a"), "cannot read ckpt_a: Is a directory"),
        (
            ("--next", "empty.json"),
            "empty.json: it is empty; write it again with `hotweights publish`",
        ),
        (("--next", "ckpt_a/model.safetensors"), "ckpt_a/model.safetensors: "),
        (("--next", "plan.json"), "plan.json: "),
        (("--next", "m_next.json", "--prev", "none.json"), "none.json does not exist"),
        (
            ("--next", "m_next.json", "--prev", "empty.json"),
            "an empty file; leave --prev away, or write [] into it",
        ),
        (("--next", "m_next.json", "--prev", "plan.json"), "plan.json: "),
        (
            ("--next", "m_next.json", "--prev", "other.json"),
            "the previous manifest is of another model, other (v0)",
        ),
        (("--next", "m_next.json", "--source", "my folder"), "is no URI"),
        (("--next", "m_next.json", "--source", "file:///my folder"), "not percent-encoded"),
        (
            ("--next", "m_next.json", "--output", "/dev/full"),
            "cannot write the plan /dev/full: No space left on device",
        ),
        (("--next", "m_next.json", "--output", "ckpt_a"), "cannot write the plan ckpt_a"),
        (("--next", "m_next.json", "--group-map", "none.json"), "none.json does not exist"),
        (
            ("--next", "m_next.json", "--group-map", "m_next.json"),
            "there is no tensor-parallel group 4194304",
        ),
        (("--next", "m_next.json", "--coord-endpoint", "tcp://nowhere"), "tcp://nowhere"),
        (
            ("--next", "m_next.json", "--prev", "m_prev.json", "--strict"),
            "are gone: gone (and 1 more)",
        ),
    ],
)
def test_one_line_names_the_thing_and_nothing_is_written(
    run: Run, here: Path, arguments: tuple[str, ...], text: str
) -> None:
    (here / "empty.json").write_bytes(b"\n")
    (here / "plan.json").write_bytes(b'{"plan_version":"1"}')
    other = (
        "--checkpoint",
        "ckpt_a",
        "--model",
        "other",
        "--version",
        "v0",
        "--output",
        "other.json",
    )
    assert run("publish", *other).returncode == 0
    before = sorted(here.rglob("*"))
    failed(run("plan", *arguments), text)
    assert sorted(here.rglob("*")) == before


def test_nobody_answers_where_a_coordinator_is_named(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotweights.commands.plan.COORDINATOR_SECONDS", 0.2)
    done = run("plan", "--next", "m_next.json", "--coord-endpoint", "tcp://127.0.0.1:1")
    failed(done, "no coordinator answers at tcp://127.0.0.1:1")


def test_a_full_disk_leaves_the_old_plan(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "transfer.plan.json").write_bytes(b"old")
    before = sorted(here.iterdir())

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    failed(
        run("plan", "--next", "m_next.json"),
        "No space left on device; name another place with --output",
    )
    assert (here / "transfer.plan.json").read_bytes() == b"old"
    assert sorted(here.iterdir()) == before


def test_an_interrupt_leaves_the_old_plan(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "transfer.plan.json").write_bytes(b"old")
    before = sorted(here.iterdir())

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    done = run("plan", "--next", "m_next.json")
    assert (done.returncode, done.stderr) == (130, "error: interrupted; nothing was written\n")
    assert (here / "transfer.plan.json").read_bytes() == b"old"
    assert sorted(here.iterdir()) == before


def test_a_folder_that_is_not_there_is_wrong_usage(run: Run, here: Path) -> None:
    assert run("plan", "--next", "m_next.json", "--output", "none/plan.json").returncode == 2
    assert run("plan", "--next", "m_next.json", "--bucket-mb", 0).returncode == 2


def test_a_plan_that_was_changed_is_refused(run: Run, here: Path) -> None:
    assert run("plan", "--next", "m_next.json").returncode == 0
    path = here / "transfer.plan.json"
    path.write_bytes(path.read_bytes().replace(b'"offset":0,', b'"offset":1,', 1))
    failed(
        run("verify-plan", "--plan", path),
        "is 1, and 0 comes out; make it again with `hotweights plan`",
    )
    path.write_bytes(b"")
    failed(run("verify-plan", "--plan", path), "it is empty")
    failed(
        run("verify-plan", "--plan", "none.json"),
        "none.json does not exist; write it with `hotweights plan`",
    )
    machine = run("verify-plan", "--plan", path, "--json")
    assert json.loads(machine.stdout)["error"]["reason"] == "BadPlan"
