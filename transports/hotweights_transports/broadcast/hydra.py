"""Where MPICH's process manager is, whether MPI can work here, and the head's end of it: one
mpiexec that starts nobody.

``mpiexec -launcher manual`` only prints what every node is to run; nodes run it themselves
(`rank_process`), so nothing needs ssh. The mpich wheel puts its programs beside the Python that
runs; a system's MPICH is taken from PATH. mpi4py is not imported here: what is not a rank never
initialises MPI.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hotweights_common.reasons import Reason
from hotweights_storage.errors import TransferError
from hotweights_transports.broadcast import mpi_program
from hotweights_transports.broadcast.launch_line import END, PREFIX
from hotweights_transports.peers.registry import Availability

START_SECONDS = 60.0  # for mpiexec to say what to launch, and then for MPI to begin in all ranks
END_SECONDS = 5.0  # for a process to end by itself, then for each signal to end it
# mpiexec ends by itself after this, should its node die before any rank has begun
JOB_SECONDS = 6 * 3600

SETTINGS = {
    # From a chain, every node receives each byte once and sends it once, whatever their number;
    # MPICH's own choice for a few
    # nodes is a binomial tree, in which rank 0 sends log2(n) times. These are the names for Ibcast;
    # Bcast has others.
    "MPIR_CVAR_IBCAST_INTRA_ALGORITHM": "tsp_tree",
    "MPIR_CVAR_IBCAST_TREE_TYPE": "kary",
    "MPIR_CVAR_IBCAST_TREE_KVAL": "1",
    "MPIR_CVAR_IBCAST_TREE_PIPELINE_CHUNK_SIZE": str(4 << 20),
    # Over plain TCP, UCX hands over 8 KiB at a time, and a rank that sleeps between looks moves one
    # such piece per look.
    "UCX_TCP_TX_SEG_SIZE": "1m",
    "UCX_TCP_RX_SEG_SIZE": "1m",
}
BETWEEN_HOSTS = {"MPIR_CVAR_NOLOCAL": "1", "UCX_TLS": "^shm"}
"""For ranks of one host that are to talk as if they were on two: where the rate between hosts is
measured without a second one.
"""
# beginnings of names: what chooses networks and ports, then what programs need to run at all
PASSED_ON = (
    "UCX_",
    "FI_",
    "MPIR_CVAR_",
)
PASSED_ON_NAMES = frozenset(
    {"MPIEXEC_PORT_RANGE", "LD_LIBRARY_PATH", "PATH", "HOME", "TMPDIR", "LANG"}
)


class MpiUnavailable(TransferError):
    """MPICH or its proxy is not on this host, or may not be run."""

    reason = Reason.MPI_UNAVAILABLE


class MpiFailed(TransferError):
    """A job did not begin, or ended early."""

    reason = Reason.MPI_FAILED


@dataclass(frozen=True, slots=True)
class Hydra:
    """Where MPICH's programs are: paths of mpiexec and of the proxy that it launches."""

    mpiexec: str
    proxy: str


def find() -> Hydra:
    """The programs beside this Python, else those of PATH. Raises `MpiUnavailable`."""
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.is_file() else shutil.which("mpiexec.hydra") or ""
    proxy = str(Path(mpiexec).parent / "hydra_pmi_proxy")
    if not mpiexec or not os.access(mpiexec, os.X_OK):
        raise MpiUnavailable(
            "there is no MPICH: pip install -e '.[mpi]' in the checkout, or put a system's mpiexec.hydra on PATH"
        )
    if not os.access(proxy, os.X_OK):
        raise MpiUnavailable(
            f"{proxy} is missing: {mpiexec} is not MPICH's with its proxy beside it"
        )
    return Hydra(mpiexec, proxy)


def availability() -> Availability:
    """Whether a rank could start here, and why. Nothing native is loaded for it."""
    if not sys.platform.startswith("linux"):
        return Availability(
            False, "ranks share memory with their node by memfd, which only Linux has"
        )
    if importlib.util.find_spec("mpi4py") is None:
        return Availability(
            False, "mpi4py is not installed: pip install -e '.[mpi]' in the checkout"
        )
    try:
        found = find()
    except MpiUnavailable as error:
        return Availability(False, str(error))
    return Availability(True, f"mpi4py {importlib.metadata.version('mpi4py')} and {found.mpiexec}")


def environment() -> dict[str, str]:
    """What programs of MPICH see of ours: no credentials, and nothing of an mpiexec that may have
    started us.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(PASSED_ON) or name in PASSED_ON_NAMES
    }


class Mpiexec:
    """One mpiexec and its launch lines, one for each of ``ranks``, in rank order. `close` ends the
    job.
    """

    def __init__(self, ranks: int, address: str, settings: Mapping[str, str] | None = None) -> None:
        """``address``: under which the nodes reach this one; ``settings``: of the ranks, beside the
        usual ones. Waits until mpiexec has printed all lines. Raises `MpiUnavailable`, and
        `MpiFailed` when they do not come within `START_SECONDS`.
        """
        arguments = [find().mpiexec, "-launcher", "manual", "-localhost", address]
        # names that need not exist: nobody is reached by them. No variable of ours goes to the
        # ranks by itself, and the working directory is one that every host has
        arguments += [
            "-hosts",
            ",".join(f"rank{number}" for number in range(ranks)),
            "-genvnone",
            "-wdir",
            "/",
        ]
        for name, value in SETTINGS.items():
            arguments += ["-genv", name, os.environ.get(name, value)]
        for name, value in (settings or {}).items():
            arguments += ["-genv", name, value]
        arguments += [
            "-n",
            str(ranks),
            sys.executable,
            "-I",
            str(Path(mpi_program.__file__).resolve()),
        ]
        self._said: deque[str] = deque(maxlen=20)  # the last lines, for an error's text
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment() | {"MPIEXEC_TIMEOUT": str(JOB_SECONDS)},
        )
        self._reader = threading.Thread(target=self._read, name="mpiexec", daemon=True)
        self._reader.start()
        try:
            self.launches = self._collect(ranks, time.monotonic() + START_SECONDS)
        except MpiFailed:
            self.close()
            raise

    @property
    def said(self) -> str:
        """The last that mpiexec and the ranks printed."""
        return " / ".join(self._said)

    def close(self, seconds: float = END_SECONDS) -> None:
        """Wait a moment for the job's end, then end it."""
        for end in (None, self._process.terminate, self._process.kill):
            if end is not None:
                end()
            try:
                self._process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                continue
        self._reader.join(END_SECONDS)
        if self._process.stdout is not None and not self._reader.is_alive():
            self._process.stdout.close()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            text = line.rstrip("\n")
            if text.startswith(PREFIX) or text == END:
                self._lines.put(text.rstrip(" "))  # mpiexec ends each line with a blank
            elif text.strip():
                self._said.append(text.strip()[:200])
        self._lines.put(None)

    def _collect(self, ranks: int, deadline: float) -> tuple[str, ...]:
        launches: list[str] = []
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise MpiFailed(
                    f"mpiexec did not say what to launch in time: {self.said or 'not a word'}"
                ) from None
            if line is None:
                raise MpiFailed(f"mpiexec ended at once: {self.said or 'without a word'}")
            if line == END:
                break
            launches.append(line)
        if len(launches) != ranks:
            raise MpiFailed(f"mpiexec launches {len(launches)} nodes instead of {ranks}")
        return tuple(launches)
