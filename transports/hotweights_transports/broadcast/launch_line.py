"""What mpiexec's manual launcher prints, and what a node makes of it: a list of arguments of which
every one was checked.

``HYDRA_LAUNCH: /…/hydra_pmi_proxy --control-port HOST:PORT --rmk user …`` reaches a node from
another one. Nothing of it goes to a shell, and nothing of it is passed on as it came:
`parse_launch` takes exactly the flags below, once each, with values in their ranges, and `command`
writes them anew behind the node's own path of the proxy. Everything else is refused.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re

from hotweights_common import hosts
from hotweights_common.reasons import Reason
from hotweights_storage.errors import TransferError

PREFIX = "HYDRA_LAUNCH: "
END = "HYDRA_LAUNCH_END"
MAX_LINE_NBYTES = 2048  # room for a path of 1,000 bytes, a host and the flags
MAX_RANKS = 1024

# the flags that MPICH's mpiexec prints under the manual launcher, and what they may say
_WORDS = {"--rmk": ("user",), "--launcher": ("manual",), "--demux": ("poll", "select")}
_NUMBERS = {
    "--pgid": (0, 0),
    "--retries": (0, 100),
    "--usize": (-2, MAX_RANKS),
    "--pmi-port": (0, 0),
    "--gpus-per-proc": (-2, -1),  # none are asked for
    "--gpu-subdevs-per-proc": (-2, -1),
    "--proxy-id": (0, MAX_RANKS - 1),
}
_LINE = re.compile(
    r"HYDRA_LAUNCH: (/[ -~]{0,1000}/hydra_pmi_proxy) (--control-port [ -~]+)", re.ASCII
)
_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,5}", re.ASCII)  # a port has five digits
# a host's name: letters, digits and hyphens between dots (RFC 1123, section 2.1)
_NAME = re.compile(
    r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*",
    re.ASCII,
)


class LaunchRefused(TransferError):
    """A line that is not exactly what mpiexec prints, or not for this node."""

    reason = Reason.LAUNCH_REFUSED


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """One node's part of a job."""

    proxy: str
    """Path of ``hydra_pmi_proxy`` on the head; `command` takes it only where the node's own is the
    same.
    """
    host: str
    port: int
    """Where mpiexec waits for the proxy."""
    words: tuple[tuple[str, str], ...]
    """The other flags, in their order."""

    @property
    def proxy_id(self) -> int:
        """Which node of the job; with one rank per node, the rank."""
        return int(dict(self.words)["--proxy-id"])


def parse_launch(line: str) -> Launch:
    """The launch that ``line`` spells, without the line's end. Raises `LaunchRefused` for anything
    else, also a line that is longer than `MAX_LINE_NBYTES`.
    """
    found = _LINE.fullmatch(line) if len(line) <= MAX_LINE_NBYTES else None
    if found is None:
        raise LaunchRefused(f"{line[:80]!a}: not a line of mpiexec's manual launcher")
    path = found[1]
    # `command` compares it with the node's own: there must be one spelling of it
    if "//" in path or "/../" in path or "/./" in path:
        raise LaunchRefused(f"{path!a}: the path of the proxy is not written out")
    _, endpoint, *rest = found[2].split(" ")
    if len(rest) % 2:
        raise LaunchRefused(f"{line[:80]!a}: a flag without a value")
    words = tuple(zip(rest[::2], rest[1::2], strict=True))
    names = [name for name, _ in words]
    if sorted(names) != sorted([*_WORDS, *_NUMBERS]):
        odd = sorted(set(names) ^ {*_WORDS, *_NUMBERS}) or sorted(
            {name for name in names if names.count(name) > 1}
        )
        raise LaunchRefused(
            f"{', '.join(odd)[:200]!a}: exactly the flags of a manual launch are taken, once each"
        )
    for name, value in words:
        _check_value(name, value)
    host, port = _endpoint(endpoint)
    return Launch(path, host, port, words)


def command(launch: Launch, proxy: str, heads: frozenset[str]) -> list[str]:
    """The arguments to run, with the node's own ``proxy``. Raises `LaunchRefused` if the head has
    another, or is none of ``heads``, the hosts that this node knows the head by.
    """
    if launch.proxy != proxy:
        raise LaunchRefused(
            f"{launch.proxy!a}: not this node's proxy {proxy}; install Hotweights at the same path"
        )
    if launch.host not in heads:
        raise LaunchRefused(
            f"{launch.host}: a launch by {', '.join(sorted(heads))} leads to another host"
        )
    host = hosts.bracketed(launch.host)
    return [
        proxy,
        "--control-port",
        f"{host}:{launch.port}",
        *(text for pair in launch.words for text in pair),
    ]


def _check_value(name: str, value: str) -> None:
    if name in _WORDS:
        if value not in _WORDS[name]:
            raise LaunchRefused(f"{name} {value[:40]!a}: must be {' or '.join(_WORDS[name])}")
        return
    least, most = _NUMBERS[name]
    if not _NUMBER.fullmatch(value) or not least <= int(value) <= most:
        raise LaunchRefused(f"{name} {value[:40]!a}: must be a number from {least} to {most}")


def _endpoint(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not _NUMBER.fullmatch(port) or not 1 <= int(port) <= 65535:
        raise LaunchRefused(f"--control-port {text[:80]!a}: has no port from 1 to 65535")
    # 253: the longest name that DNS can ask for (RFC 1035, section 2.3.4, without what encodes it)
    if _is_address(host) or (len(host) <= 253 and _NAME.fullmatch(host)):
        return host.strip("[]"), int(port)
    raise LaunchRefused(f"--control-port {text[:80]!a}: names no host")


def _is_address(host: str) -> bool:
    inner = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        return ipaddress.ip_address(inner).version == (4 if inner == host else 6)
    except ValueError:
        return False
