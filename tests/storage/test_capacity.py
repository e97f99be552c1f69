"""Capacity: the tightest of the node and its control groups decides, and the refusal says what to
do.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hotweights_storage.capacity import available_nbytes, check_capacity
from hotweights_storage.errors import NoCapacity

GIB = 1 << 30


def machine(root: Path, files: dict[str, str]) -> Path:
    """A root folder with 100 GiB available and whatever else is given."""
    meminfo = f"MemTotal: 1 kB\nMemAvailable: {100 * GIB // 1024} kB\n"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "sys/fs/cgroup/"
V1 = "sys/fs/cgroup/memory/"


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({"proc/self/cgroup": "0::/\n"}, 100 * GIB),
        ({"proc/self/cgroup": "0::/\n", V2 + "memory.max": "max\n", V2 + "memory.current": "5\n"}, 100 * GIB),
        ({"proc/self/cgroup": "0::/\n", V2 + "memory.max": f"{8 * GIB}\n", V2 + "memory.current": f"{3 * GIB}\n",
          V2 + "memory.stat": f"anon 1\ninactive_file {GIB}\n"}, 6 * GIB),
        ({"proc/self/cgroup": "0::/pods/agent\n",
          V2 + "pods/memory.max": f"{4 * GIB}\n", V2 + "pods/memory.current": f"{3 * GIB}\n",
          V2 + "pods/agent/memory.max": f"{9 * GIB}\n", V2 + "pods/agent/memory.current": "0\n"}, GIB),
        ({"proc/self/cgroup": "5:cpu,memory:/pod\n3:cpuset:/x\n", V1 + "pod/memory.limit_in_bytes": f"{2 * GIB}\n",
          V1 + "pod/memory.usage_in_bytes": f"{GIB}\n", V1 + "pod/memory.stat": "total_inactive_file "
              f"{GIB // 2}\n",
          V1 + "memory.limit_in_bytes": "9223372036854771712\n", V1 + "memory.usage_in_bytes": "1\n"}, GIB * 3 // 2),
    ],
    ids=["no group", "no limit", "v2 in a container", "v2 nested", "v1"],
)  # fmt: skip
def test_the_tightest_limit_counts(tmp_path: Path, files: dict[str, str], available: int) -> None:
    assert available_nbytes(machine(tmp_path, files)) == available


def test_too_much_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    root = machine(tmp_path, {"proc/self/cgroup": "0::/\n"})
    check_capacity(90 * GIB, 10 * GIB, root)
    with pytest.raises(NoCapacity, match="raise the agent's memory limit, or release a version"):
        check_capacity(90 * GIB, 10 * GIB + 1, root)


def test_this_machine_has_an_answer() -> None:
    assert available_nbytes() > 0
