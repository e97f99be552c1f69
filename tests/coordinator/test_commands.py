"""The commands as they are typed: what they print, what they exit with, and that an error is one
line.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hotweights import cli
from hotweights.commands import coordinator as commands
from hotweights.commands import options
from hotweights_storage import linux
from tests.coordinator.running import Coordinator, manifest, plan, running

PROCESS_SECONDS = 50.0
ASKING = ("begin", "commit", "abort", "precommit", "status", "coord-status", "coord-sub")


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Coordinator]:
    with running() as found:
        monkeypatch.setenv("HOTWEIGHTS_COORD", found.endpoint)
        yield found


class Shell:
    """Types commands."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *words: str | Path) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        if words[0] in ASKING and "--timeout" not in words:  # 5 s may be short on a busy machine
            words = (*words, "--timeout", "50")
        self._monkeypatch.setattr(sys, "argv", ["hotweights", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = self._capsys.readouterr()
        return code, said.out, said.err

    def refused(self, *words: str | Path) -> str:
        """The error, which is one line."""
        code, out, err = self(*words)
        assert (code, out) == (1, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.delenv("HOTWEIGHTS_COORD_TOKEN", raising=False)
    return Shell(monkeypatch, capsys)


def test_a_program_may_open_as_many_files_as_the_hard_limit_allows(shell: Shell) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        shell("--help")
        raised, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert raised == min(hard, linux.MAX_DESCRIPTORS)


def test_an_update_by_hand(shell: Shell, coordinator: Coordinator, tmp_path: Path) -> None:
    path = tmp_path / "a plan.json"
    path.write_bytes(plan().canonical)
    code, out, _ = shell("coord-submit-plan", "--plan", path)
    assert (code, plan().digest in out) == (0, True)
    assert shell("begin", "--version", "v1")[0] == 0
    with coordinator.client() as client:
        client.call("register", worker_id="w1", host="here")
        assert "waiting for w1" in shell("status")[1]
        assert "w1" in shell.refused("commit", "--version", "v1")
        assert "precommitted" in shell("precommit", "--worker-id", "w1")[1]
        done = json.loads(shell("commit", "--version", "v1", "--json")[1])
        assert done["state"] == "committed"
        client.call(
            "heartbeat", worker_id="w1", applied={"digest": done["digest"], "token": done["token"]}
        )
        assert "engines not known" in shell("commit", "--version", "v1", "--wait")[1]
        client.call("heartbeat", worker_id="w1", engines=0)
        assert "no engines" in shell("commit", "--version", "v1", "--wait")[1]
        client.call("heartbeat", worker_id="w1", engines=2)
    page = shell("coord-status")[1]
    for expected in ("committed v1", "w1", "applied", "last events", "begin", "commit", "ago"):
        assert expected in page
    assert page.count("2 engines") == 2, "of all workers, and of this one"
    shown = json.loads(shell("coord-status", "--json")[1])
    assert shown["state"] == "committed"
    assert [worker["engines"] for worker in shown["worker_details"]] == [2]
    assert "AlreadyCommitted" in shell("abort", "--json")[1]
    assert "final" in shell.refused("abort")


def test_waits_until_it_is_committed_or_says_why_not(
    shell: Shell, coordinator: Coordinator, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(plan().canonical)
    shell("coord-submit-plan", "--plan", path)
    with coordinator.client() as client:
        client.call("register", worker_id="slow")
    assert "waiting for slow" in shell.refused(
        "begin", "--version", "v1", "--wait", "--wait-timeout", "0.1"
    )
    assert shell("abort", "--reason", "too slow")[0] == 0
    assert "too slow" in shell("status")[1]


def test_sets_the_current_manifest(shell: Shell, coordinator: Coordinator, tmp_path: Path) -> None:
    path = tmp_path / "m.manifest.json"
    path.write_bytes(manifest().canonical)
    assert "v1" in shell("coord-set-current", "--manifest", path)[1]
    with coordinator.client() as client:
        assert client.call("get_current_manifest").binary == manifest().canonical
    page = shell("coord-status")[1]
    assert "current      none" in page
    assert f"plans from   v1 {manifest().digest}, set by hand" in page
    path.write_bytes(b"{}")
    assert "manifest" in shell.refused("coord-set-current", "--manifest", path)


def test_prints_events(shell: Shell, coordinator: Coordinator) -> None:
    code, out, _ = shell(
        "coord-sub", "--pub-endpoint", coordinator.events_endpoint, "--print-last", "--for", "0.1"
    )
    assert (code, "test leads" in out) == (0, True)


@pytest.mark.parametrize(
    "words",
    [
        ("status",),
        ("coord-status",),
        ("begin", "--version", "v"),
        ("commit", "--version", "v"),
        ("abort",),
    ],
)
def test_without_a_coordinator_it_is_one_line(shell: Shell, words: tuple[str, ...]) -> None:
    said = shell.refused(*words, "--endpoint", "tcp://127.0.0.1:1", "--timeout", "0.1")
    assert "tcp://127.0.0.1:1" in said
    assert "hotweights coord-serve" in said
    code, out, _ = shell(*words, "--endpoint", "tcp://127.0.0.1:1", "--timeout", "0.1", "--json")
    assert (code, json.loads(out)["error"]["reason"]) == (1, "CoordinatorUnreachable")


def test_events_of_nobody_are_one_line(shell: Shell) -> None:
    said = shell.refused(
        "coord-sub", "--pub-endpoint", "tcp://127.0.0.1:1", "--timeout", "0.1", "--for", "9"
    )
    assert "tcp://127.0.0.1:1" in said
    assert "hotweights coord-serve" in said


def test_events_need_the_token(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("another")
    with running(token="secret") as coordinator:
        said = shell.refused(
            "coord-sub", "--pub-endpoint", coordinator.events_endpoint, "--timeout", "0.5",
            "--token-file", tmp_path / "token",
        )  # fmt: skip
    assert "--token-file" in said


@pytest.mark.parametrize("words", [("status",), ("coord-sub", "--for", "9")])
def test_a_name_without_an_address_is_said_to_be_that(shell: Shell, words: tuple[str, ...]) -> None:
    said = shell.refused(*words, "--endpoint", "tcp://no-such-host.invalid:1", "--timeout", "0.1")
    assert "no-such-host.invalid has no address" in said


def test_what_cannot_be_asked_is_one_line(
    shell: Shell, coordinator: Coordinator, tmp_path: Path
) -> None:
    assert "no plan of version v9" in shell.refused("begin", "--version", "v9")
    assert "begin" in shell.refused("commit", "--version", "v9")
    assert "ghost" in shell.refused("precommit", "--worker-id", "ghost")
    assert "nothing to abort" in shell.refused("abort")
    assert "does not exist" in shell.refused("coord-submit-plan", "--plan", tmp_path / "none")
    (tmp_path / "garbage").write_bytes(b"garbage")
    assert "hotweights plan" in shell.refused("coord-submit-plan", "--plan", tmp_path / "garbage")
    assert "tcp://" in shell.refused("status", "--endpoint", "nonsense")


def test_the_token_comes_from_a_file_or_the_environment(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("secret\n")
    (tmp_path / "empty").write_text("\n")
    with running(token="secret") as coordinator:
        monkeypatch.setenv("HOTWEIGHTS_COORD", coordinator.endpoint)
        assert "HOTWEIGHTS_COORD_TOKEN" in shell.refused("status")
        assert shell("status", "--token-file", tmp_path / "token")[0] == 0
        assert "is empty" in shell.refused("status", "--token-file", tmp_path / "empty")
        assert "cannot read" in shell.refused("status", "--token-file", tmp_path / "none")
        monkeypatch.setenv("HOTWEIGHTS_COORD_TOKEN", "other")
        assert "not the coordinator's" in shell.refused("status")
        monkeypatch.setenv("HOTWEIGHTS_COORD_TOKEN", "secret")
        assert shell("status")[0] == 0


def test_what_cannot_be_served_is_one_line(
    shell: Shell, coordinator: Coordinator, tmp_path: Path
) -> None:
    serve = ("coord-serve", "--metrics-port", "0", "--endpoint")
    assert "--token-file" in shell.refused(*serve, "tcp://0.0.0.0:0")
    assert "does another coordinator run?" in shell.refused(*serve, coordinator.endpoint)
    assert "coord-keys" in shell.refused(*serve, "tcp://127.0.0.1:0", "--curve", tmp_path)
    taken = str(coordinator.metrics_port)
    said = shell.refused("coord-serve", "--endpoint", "tcp://127.0.0.1:0", "--metrics-port", taken)
    assert taken in said
    assert "HOTWEIGHTS_COORD_METRICS_PORT" in said
    assert shell(*serve, "tcp://127.0.0.1:0", "--backend", "paper")[0] == 2


def test_redis_that_is_not_there_is_never_silently_memory(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("HOTWEIGHTS_COORD_BACKEND", "redis")
    monkeypatch.setenv("HOTWEIGHTS_REDIS_URL", f"redis://127.0.0.1:{port}/0")
    assert str(port) in shell.refused(
        "coord-serve", "--endpoint", "tcp://127.0.0.1:0", "--metrics-port", "0"
    )


def test_writes_keys(shell: Shell, tmp_path: Path) -> None:
    assert shell("coord-keys", tmp_path / "keys")[0] == 0
    with running(curve=tmp_path / "keys") as coordinator:
        assert (
            shell("status", "--endpoint", coordinator.endpoint, "--curve", tmp_path / "keys")[0]
            == 0
        )
    assert "holds keys already" in shell.refused("coord-keys", tmp_path / "keys")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_until_it_is_told_to_stop(number: signal.Signals) -> None:
    command = [
        sys.executable,
        "-m",
        "hotweights.cli",
        "coord-serve",
        "--endpoint",
        "tcp://127.0.0.1:0",
    ]
    process = subprocess.Popen(
        [*command, "--metrics-port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        for expected in (
            "serves at tcp://127.0.0.1:",
            "events at",
            "metrics at port",
            "backend memory",
            "auth none",
        ):
            assert expected in line
        process.send_signal(number)
        out, err = process.communicate(timeout=PROCESS_SECONDS)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, "Traceback" in err) == (0, "", False)


@contextmanager
def typed(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A command as a process, for signals."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hotweights.cli", *words, "--timeout", "50"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.timeout(180)
def test_ctrl_c_is_how_listening_ends() -> None:
    with (
        running() as coordinator,
        typed("coord-sub", "--print-last", "--endpoint", coordinator.endpoint) as process,
    ):
        assert process.stdout is not None
        assert "test leads" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PROCESS_SECONDS)
    assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.timeout(180)
def test_ctrl_c_says_what_goes_on_without_the_command() -> None:
    with running() as coordinator, coordinator.client() as client:
        client.call("register", worker_id="slow")
        client.call("submit_plan", binary=plan().canonical)
        with typed(
            "begin", "--version", "v1", "--wait", "--endpoint", coordinator.endpoint
        ) as process:
            until = time.monotonic() + PROCESS_SECONDS
            while not (status := client.call("status").result)["version"]:
                assert time.monotonic() < until
                time.sleep(0.05)
            # begun or not, as far as the command has heard: either is said
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=PROCESS_SECONDS)
        assert client.call("status").result["state"] == "begun"
    assert process.returncode == 130
    assert err.startswith("error: interrupted; ")
    assert "hotweights coord-status" in err
    assert f"token {status['token']}" in err or "is not known" in err


def test_what_was_interrupted_after_it_began_names_its_token(
    shell: Shell, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with coordinator.client() as client:
        client.call("submit_plan", binary=plan().canonical)

    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_waited", pressed)
    code, out, err = shell("begin", "--version", "v1", "--wait")
    assert (code, out) == (130, "")
    assert "the update to v1 goes on (token " in err
    assert "hotweights abort" in err


def test_wrong_usage_is_told_to_machines_too(shell: Shell) -> None:
    code, out, err = shell("status", "--nonsense", "--json")
    said = json.loads(out)["error"]
    assert (code, said["reason"], err) == (2, "WrongUsage", "")
    assert "--nonsense" in said["message"]
    assert "--version" in json.loads(shell("begin", "--json")[1])["error"]["message"]
    assert shell("status", "--help", "--json")[0] == 0


def test_says_which_release_it_is(shell: Shell) -> None:
    code, out, _ = shell("--version")
    assert (code, out.split()[0]) == (0, "hotweights")


def test_who_sits_at_a_terminal_is_told_what_is_waited_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "SILENT_SECONDS", 0.01)
    with options.waiting("nobody"):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    said, until = "", time.monotonic() + PROCESS_SECONDS
    with options.waiting("Godot"):
        while not said and time.monotonic() < until:
            time.sleep(0.01)
            said = capsys.readouterr().err
    assert said == "waiting for Godot\n"


def test_a_level_of_the_log_is_one_of_four(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOTWEIGHTS_LOG_LEVEL", "loud")
    for words in (("coord-serve",), ("worker",), ("replicate", "--plan", tmp_path / "none")):
        assert "may be debug, info, warning, error" in shell.refused(*words)


@pytest.mark.usefixtures("coordinator")
def test_a_token_that_nobody_asks_for_is_told_so(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOTWEIGHTS_COORD_TOKEN", "unasked")
    assert "leave both away where it asks for none" in shell.refused("status")


def test_a_port_that_there_is_not_is_named(shell: Shell) -> None:
    assert "no port 99999" in shell.refused("status", "--endpoint", "tcp://127.0.0.1:99999")


def test_what_cannot_be_meant_is_wrong_usage(shell: Shell) -> None:
    for words, text in (
        (("begin", "--version", "v1", "--digest", "sha256:00"), "64 hexadecimal digits"),
        (("begin", "--version", "v1", "--wait-timeout", "-5"), "--wait-timeout"),
        (("commit", "--version", "v1", "--wait-timeout", "-5"), "--wait-timeout"),
    ):
        code, out, _ = shell(*words, "--json")
        assert (code, json.loads(out)["error"]["reason"]) == (2, "WrongUsage")
        assert text in json.loads(out)["error"]["message"]
