"""What is not exactly a line of mpiexec's manual launcher starts nothing."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotweights_transports.broadcast.launch_line import (
    PREFIX,
    Launch,
    LaunchRefused,
    command,
    parse_launch,
)

PROXY = "/opt/hot weights/bin/hydra_pmi_proxy"
WORDS = (
    "--rmk user --launcher manual --demux poll --pgid 0 --retries 10 --usize -1 --pmi-port 0 "
    "--gpus-per-proc -2 --gpu-subdevs-per-proc -2 --proxy-id 1"
)
LINE = f"{PREFIX}{PROXY} --control-port 127.0.0.1:41261 {WORDS}"
HEADS = frozenset({"127.0.0.1"})


def test_a_real_line() -> None:
    launch = parse_launch(LINE)
    assert (launch.proxy, launch.host, launch.port, launch.proxy_id) == (
        PROXY,
        "127.0.0.1",
        41261,
        1,
    )
    assert command(launch, PROXY, HEADS) == [
        PROXY,
        "--control-port",
        "127.0.0.1:41261",
        *WORDS.split(" "),
    ]


@pytest.mark.parametrize("host", ["10.0.0.7", "node-1", "node-1.cluster.local", "[fd00::1]"])
def test_hosts(host: str) -> None:
    launch = parse_launch(LINE.replace("127.0.0.1", host))
    assert command(launch, PROXY, frozenset({launch.host}))[2] == f"{host}:41261"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (PREFIX, ""),
        (PREFIX, "HYDRA_LAUNCH:"),
        (PROXY, "hydra_pmi_proxy"),
        (PROXY, "/bin/sh"),
        (PROXY, "/bin/sh -c x /hydra_pmi_proxy_"),
        (PROXY, "/opt/../bin/hydra_pmi_proxy"),
        (PROXY, "/opt//hydra_pmi_proxy"),
        ("127.0.0.1:41261", "127.0.0.1"),
        ("127.0.0.1:41261", "127.0.0.1:0"),
        ("127.0.0.1:41261", "127.0.0.1:65536"),
        ("127.0.0.1:41261", "127.0.0.1:041261"),
        ("127.0.0.1:41261", ":41261"),
        ("127.0.0.1:41261", "-x:41261"),
        ("127.0.0.1:41261", "$(reboot):41261"),
        ("127.0.0.1:41261", "a;b:41261"),
        ("127.0.0.1:41261", "fd00::1:41261"),
        ("127.0.0.1:41261", "[127.0.0.1]:41261"),
        ("--rmk user", "--rmk slurm"),
        ("--launcher manual", "--launcher ssh"),
        ("--launcher manual", "--launcher manual --launcher manual"),
        ("--launcher manual ", ""),
        ("--launcher manual", "--launcher-exec /bin/sh"),
        ("--retries 10", "--retries 1000"),
        ("--retries 10", "--retries +1"),
        ("--retries 10", "--retries 1_0"),
        ("--retries 10", "--retries \u0661"),
        ("--pgid 0", "--pgid 1"),
        ("--proxy-id 1", "--proxy-id -1"),
        ("--proxy-id 1", "--proxy-id 1 --debug"),
        ("--proxy-id 1", "--proxy-id 1 --debug 1"),
        ("--proxy-id 1", "--proxy-id 1 "),
        ("--proxy-id 1", "--proxy-id 1\n"),
        ("--proxy-id 1", "--proxy-id 1; reboot"),
        ("--proxy-id 1", "--proxy-id 1\0"),
        (" --rmk", "  --rmk"),
        (" --rmk", "\t--rmk"),
        (WORDS, WORDS + " " * 3000),
    ],
)
def test_anything_else_is_refused(old: str, new: str) -> None:
    assert old in LINE
    with pytest.raises(LaunchRefused):
        parse_launch(LINE.replace(old, new))


def test_only_the_own_proxy_and_the_own_head() -> None:
    with pytest.raises(LaunchRefused, match="not this node's proxy"):
        command(parse_launch(LINE), "/usr/bin/hydra_pmi_proxy", HEADS)
    with pytest.raises(LaunchRefused, match="leads to another host"):
        command(parse_launch(LINE), PROXY, frozenset({"10.0.0.1"}))


@given(st.data())
def test_a_damaged_line_is_refused_or_is_as_harmless(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(LINE) - 1))
    length = data.draw(st.integers(0, 12))
    line = LINE[:at] + data.draw(st.text(max_size=12)) + LINE[at + length :]
    try:
        found = command(parse_launch(line), PROXY, HEADS)
    except LaunchRefused:
        return
    assert found[0] == PROXY
    assert found[1] == "--control-port"
    assert found[2].startswith("127.0.0.1:")
    assert sorted(found[3::2]) == sorted(WORDS.split(" ")[::2])
    assert all(shlex.quote(word) == word for word in found[1:])


@given(st.text())
def test_text_is_no_launch(text: str) -> None:
    for line in (text, PREFIX + text, f"{PREFIX}{PROXY} {text}"):
        with pytest.raises(LaunchRefused):
            parse_launch(line)


@given(st.permutations(WORDS.split(" --")))
def test_the_order_of_flags_is_free(words: list[str]) -> None:
    text = " ".join("--" + word.removeprefix("--") for word in words)
    assert isinstance(parse_launch(f"{PREFIX}{PROXY} --control-port 127.0.0.1:1 {text}"), Launch)
