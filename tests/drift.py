"""What a tool that keeps a cluster as a repository has it calls a difference."""

from __future__ import annotations

from collections.abc import Iterator


def drift(written: object, live: object, path: str = "") -> Iterator[str]:
    """Where an object is not as it was written. What is there besides does not count, but within a
    list: Argo CD takes lists of kinds that it does not know whole, with what the API server adds to
    their items.
    """
    if isinstance(written, dict) and isinstance(live, dict):
        for key, value in written.items():
            yield from drift(value, live.get(key), f"{path}.{key}")
    elif written != live:
        yield f"{path}: {written!r} became {live!r}"
