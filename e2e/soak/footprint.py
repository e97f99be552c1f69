"""What a process holds that the kernel counts, and whether it stays flat.

A single look says little: a request that is under way holds a connection, and a heap breathes. What
leaks does not come back, so the least of several looks is compared with the least of later ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from e2e.engine.launch import VLLM, descendants

TITLE = "VLLM::"  # vLLM names its processes so, all but the server


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of one process, at one moment."""

    resident_nbytes: int  # memory, that of mapped images too
    page_table_nbytes: int
    mappings: int
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        """See proc(5). Raises OSError where the process has ended."""
        proc = Path(f"/proc/{pid}")
        lines = (line.partition(":") for line in (proc / "status").read_text().splitlines())
        status = {key: value.split() for key, _, value in lines}
        return cls(
            int(status["VmRSS"][0]) << 10,  # they are in kB
            int(status["VmPTE"][0]) << 10,
            len((proc / "maps").read_text().splitlines()),
            sum(1 for _ in (proc / "fd").iterdir()),
        )


ALLOWED = Footprint(16 << 20, 512 << 10, 64, 8)
"""By how much one may have grown and still be flat. Less than two of the images that are swapped,
of pages or mappings; as many descriptors as there are clients, who hold one each.
"""


def processes(vllm: VLLM) -> dict[str, int]:
    """Their pids by what they are: ``server``, ``EngineCore``, and a worker for each rank."""
    found = {"server": vllm.process.pid}
    for pid in descendants(vllm.process.pid):
        title = Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0]
        if title.startswith(TITLE):
            found[title.removeprefix(TITLE).strip()] = pid
    return found


def least(footprints: Iterable[Footprint]) -> Footprint:
    """The least of each figure. Raises ValueError where there is none."""
    seen = list(footprints)
    return Footprint(*(min(getattr(one, f.name) for one in seen) for f in fields(Footprint)))


def growth(before: Sequence[Footprint], after: Sequence[Footprint]) -> list[str]:
    """What is not flat, in words; nothing where all is."""
    old, new = least(before), least(after)
    return [
        f"{f.name} grew from {getattr(old, f.name)} to {getattr(new, f.name)}"
        for f in fields(Footprint)
        if getattr(new, f.name) - getattr(old, f.name) > getattr(ALLOWED, f.name)
    ]
