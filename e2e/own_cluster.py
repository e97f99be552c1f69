"""Programs that break a cluster of this machine: what all of them refuse, tell, and leave behind."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable

from rich.console import Console

import localcluster
from e2e.harness.environment import NotSet
from e2e.harness.kubectl import CommandFailed, TimedOut
from localcluster import ClusterError
from localvllm.build import BuildError


def run_on_own_cluster(parser: argparse.ArgumentParser, work: Callable[[Console], int]) -> int:
    """What ``work`` gives: 0 when all held, else 1, also when the cluster could not be had; 130 after
    Ctrl-C. The cluster is gone afterwards. With a KUBECONFIG nothing is begun.
    """
    if os.environ.get("KUBECONFIG"):
        parser.error("it breaks nodes, agents or the API server, so it takes no KUBECONFIG")
    for one in (signal.SIGINT, signal.SIGTERM):  # shells have what they start with & ignore Ctrl-C
        signal.signal(one, signal.default_int_handler)
    out, name = Console(), parser.prog.rpartition(".")[2]
    try:
        return work(out)
    except (CommandFailed, TimedOut, ClusterError, BuildError, NotSet, OSError) as error:
        out.print(f"{name}: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        out.print(f"{name}: interrupted")
        return 130
    finally:
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.SIG_IGN)  # who cannot wait would leave half of it running
        localcluster.down()
