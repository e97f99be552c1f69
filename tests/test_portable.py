"""Hosts that are no Linux: everything imports, and what needs no shared memory of the kernel works
(macOS is developed on).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

pytestmark = pytest.mark.timeout(200)  # it imports everything

AS_ON_A_MAC = """
import fcntl, mmap, os, select, signal, socket, sys
import asyncio, importlib.metadata, multiprocessing.connection, sysconfig  # others' libraries know macOS by themselves
import numpy, prometheus_client, pydantic, redis.asyncio, rich.progress, safetensors.numpy, typer.testing, yaml, zmq.asyncio
sysconfig.get_config_vars()
for module, prefixes in (
    (os, ("memfd_create", "MFD_", "O_PATH", "O_TMPFILE", "posix_fadvise", "POSIX_FADV", "sched_getaffinity",
          "sched_setaffinity", "eventfd", "EFD_", "splice", "copy_file_range", "pidfd_open", "posix_fallocate", "setns", "unshare")),
    (fcntl, ("F_SEAL", "F_ADD_SEALS", "F_GET_SEALS", "F_SETPIPE_SZ", "F_OFD")),
    (mmap, ("MAP_POPULATE", "MADV_HUGEPAGE", "MADV_POPULATE", "MADV_DONTDUMP")),
    (select, ("epoll", "EPOLL")),
    (socket, ("SO_PEERCRED", "TCP_USER_TIMEOUT", "TCP_KEEPIDLE", "SOCK_CLOEXEC", "SOCK_NONBLOCK", "AF_NETLINK", "MSG_ZEROCOPY")),
    (signal, ("sigtimedwait", "SIGRTMIN", "SIGRTMAX", "pidfd_send_signal")),
):
    for name in [name for name in vars(module) if name.startswith(prefixes)]:
        delattr(module, name)
del os.O_DIRECT  # not O_DIRECTORY
sys.platform = "darwin"
for absent in ("ucxx", "mpi4py", "cupy", "kvikio", "torch", "vllm"):
    sys.modules[absent] = None
"""

IMPORT_EVERYTHING = """
import importlib, pkgutil
for package in ("hotweights", "hotweights_planner", "hotweights_transports", "hotweights_agent"):
    found = importlib.import_module(package)
    for module in pkgutil.walk_packages(found.__path__, f"{package}."):
        if module.name.startswith("hotweights.adapters.") or module.name.endswith(("__main__", ".broadcast.mpi_program")):
            continue  # they import torch and vLLM at their top, or are programs
        importlib.import_module(module.name)
importlib.import_module("hotweights.adapters.vllm_auto")
importlib.import_module("hotweights.adapters.vllm_extension")
print("imported")
"""

PLAN = """
from typer.testing import CliRunner
from hotweights.cli import app
for command in ("publish --checkpoint next --version v1 --output next.json", "plan --next next.json --output plan.json",
                "verify-plan --plan plan.json"):
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, (command, done.output, done.exception)
print("planned")
"""


def python(code: str, folder: Path) -> str:
    words = [sys.executable, "-c", AS_ON_A_MAC + code]
    # or it knows what this host has committed
    environment = os.environ | {"HOTWEIGHTS_HOME": str(folder / "home")}
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_module_imports(tmp_path: Path) -> None:
    assert python(IMPORT_EVERYTHING, tmp_path).strip() == "imported"


def test_publishing_and_planning_work(tmp_path: Path) -> None:
    (tmp_path / "next").mkdir()
    save_file(
        {"weight": numpy.ones((64, 64), numpy.float32)}, tmp_path / "next" / "model.safetensors"
    )
    assert python(PLAN, tmp_path).strip().endswith("planned")


def test_a_plan_is_replicated(tmp_path: Path) -> None:
    (tmp_path / "next").mkdir()
    save_file(
        {"weight": numpy.ones((64, 64), numpy.float32)}, tmp_path / "next" / "model.safetensors"
    )
    text = PLAN.replace(
        '"verify-plan --plan plan.json"',
        '"replicate --plan plan.json --verify --commit --home home --metrics-port 0"',
    )
    assert python(text, tmp_path).strip().endswith("planned")
    assert (tmp_path / "home" / "current" / "model.safetensors").is_file()
