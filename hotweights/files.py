"""Files that people name: read up to a bound, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from hotweights_common import files
from hotweights_common.errors import HotweightsError
from hotweights_common.reasons import Reason
from hotweights_storage.errors import SourceUnavailable


def read_bounded(path: Path, most_nbytes: int, remedy: str) -> bytes:
    """All bytes of a file, if they are at most ``most_nbytes``; ``remedy`` is what to do where it
    cannot be read. Raises `SourceUnavailable`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most_nbytes + 1)  # one more: to see that there is more
    except FileNotFoundError as error:
        raise SourceUnavailable(f"{path} does not exist; {remedy}") from error
    except OSError as error:
        raise SourceUnavailable(
            f"cannot read {path}: {error.strerror}; {remedy}", Reason.SOURCE_UNREADABLE
        ) from error
    if len(content) > most_nbytes:
        raise SourceUnavailable(
            f"{path} has more than {most_nbytes} bytes; {remedy}", Reason.SOURCE_UNREADABLE
        )
    return content


def write_whole(target: Path, content: bytes, what: str) -> None:
    """Put ``content`` in place of ``target`` in one step; ``what`` it is stands in the error.
    Raises `HotweightsError`.
    """
    try:
        if target.exists() and not target.is_file() and not target.is_dir():
            target.write_bytes(content)  # a device or a pipe is written to, never replaced
        else:
            files.replace(target, content, 0o644)
    except OSError as error:
        text = f"cannot write {what} {target}: {error.strerror}; name another place with --output"
        raise HotweightsError(text, Reason.CANNOT_WRITE) from error
