"""UCX as it is on this host: the only module that imports it, late, and says whether and over what
it works.

What a user set in the environment (``UCX_TLS``, ``UCX_NET_DEVICES``, ``UCX_TCP_PORT_RANGE``, …)
always counts; everything else is set here, for UCX in this process only, so that an MPI that is
started from it chooses for itself. Why these settings:

- ``TLS``: nothing but the network. Memory that is shared within a host does not work across
  containers, where UCX finds out too late, and weights change hands within a host as file
  descriptors; GPUs have nothing to send either, for chunks lie in memory.
- ``TCP_TX_SEG_SIZE``, ``TCP_RX_SEG_SIZE``: with the default of 8 KiB, UCX's TCP is three times
  slower.
- ``UCX_LOG_FILE``, ``UCX_LOG_LEVEL``: UCX would write to the standard output, where results belong,
  what every error here repeats.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import threading
from typing import Any, Final

OPTIONS: Final = {"TLS": "^shm,cuda", "TCP_TX_SEG_SIZE": "256k", "TCP_RX_SEG_SIZE": "256k"}
ENVIRONMENT: Final = {
    "UCX_LOG_FILE": "stderr",
    "UCX_LOG_LEVEL": "fatal",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
}
# what UCX calls its parts that can do RDMA
RDMA_COMPONENTS: Final = frozenset({"ib", "gaudi_gdr", "srd", "efa", "ugni"})

_opening = threading.Lock()  # of contexts, one at a time


class Unavailable(Exception):
    """There is no UCX here, or it finds nothing to work with; the message says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Library:
    """What is used of ucxx: its bindings to UCX itself, because its asyncio layer polls while it
    waits.
    """

    api: Any
    array: Any
    tag: Any
    error: type[Exception]
    versions: str

    def open(self) -> tuple[Any, Any]:
        """A context and its one worker, for one thread at a time: ucxx cannot share a context among
        threads.
        """
        options = {
            name: value for name, value in OPTIONS.items() if f"UCX_{name}" not in os.environ
        }
        with _opening:
            context = self.api.UCXContext(options)
            worker = self.api.UCXWorker(
                context, enable_delayed_submission=False, enable_python_future=False
            )
        worker.init_blocking_progress_mode()
        return context, worker


@functools.cache
def load() -> Library:
    """UCX, imported at the first call; its environment is set before, because it reads how to log
    when it is loaded. Raises `Unavailable`.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ucxx
        from ucxx import exceptions, types
        from ucxx._lib import arr, libucxx
    except (ImportError, OSError) as error:  # OSError: a library beneath it that does not load
        raise Unavailable(
            f"ucxx cannot be imported ({error}): pip install -e '.[ucx]' in the checkout"
        ) from error
    version = ".".join(str(number) for number in ucxx.get_ucx_version())
    return Library(
        libucxx,
        arr.Array,
        types.Tag,
        exceptions.UCXError,
        f"ucxx {ucxx.__version__}, UCX {version}",
    )


@functools.cache
def live() -> str:
    """The networks that UCX found here, in words; raises `Unavailable` where there is none."""
    library = load()
    try:
        context, _worker = library.open()
    except library.error as error:
        raise Unavailable(
            f"{library.versions} finds no network here ({error}): see UCX_TLS and UCX_NET_DEVICES"
        ) from error
    return f"{library.versions}: {describe(context.info)}"


def describe(info: str) -> str:
    """Of what ``ucp_context_print_info`` prints: the transports with their devices, and why there
    is no faster one.
    """
    components = set(re.findall(r"^#\s+component \d+\s*:\s*(\S+)", info, re.MULTILINE))
    networks: dict[str, list[str]] = {}
    for transport, device in re.findall(
        r"^#\s+resource \d+\s*:.*?(\w+)/(\S+)\s*$", info, re.MULTILINE
    ):
        if transport != "self":
            networks.setdefault(transport, []).append(device)
    found = ", ".join(
        f"{transport} on {' '.join(devices)}" for transport, devices in sorted(networks.items())
    )
    if set(networks) - {"tcp"}:
        return found
    if components & RDMA_COMPONENTS:
        return f"{found} only: no RDMA device here that this process may use"
    return f"{found} only: this libucx has no verbs (the wheel has none; a system's UCX may)"
