"""Numbers of bytes for people: powers of 1024 where Kubernetes shows memory, powers of 1000 where
disks and networks are spoken of.
"""

from __future__ import annotations


def binary(nbytes: float) -> str:
    """``12.3GiB``, as Kubernetes writes quantities: without a space."""
    return _show(nbytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB"), "")


def decimal(nbytes: float) -> str:
    """``1.4 GB``, as SI wants it: with a space."""
    return _show(nbytes, 1000, ("B", "kB", "MB", "GB", "TB"), " ")


def _show(nbytes: float, step: int, units: tuple[str, ...], space: str) -> str:
    """One digit after the point, and the next unit as soon as that rounding would show ``step`` of
    this one.
    """
    for unit in units[:-1]:  # the largest takes whatever is left
        if round(nbytes, 1) < step:
            return (
                f"{nbytes:.0f}{space}{unit}" if unit == units[0] else f"{nbytes:.1f}{space}{unit}"
            )
        nbytes /= step
    return f"{nbytes:.1f}{space}{units[-1]}"
