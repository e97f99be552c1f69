"""What the times and modes of a folder's files say about the save that wrote them: is it whole, and
may the agents read it?

Only whoever publishes asks. A folder that is copied loses both, so all but a marker that was asked
for is told, and not refused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from os import stat_result

from hotweights_planner.errors import BadCheckpoint
from hotweights_storage.checkpoint import Checkpoint
from hotweights_storage.sources import permissions
from hotweights_storage.sources.folder import FileSource
from hotweights_storage.weight_files import INDEX_ENDING


def check_finished(
    source: FileSource, checkpoint: Checkpoint, markers: Collection[str], lenient: bool = False
) -> None:
    """Raise `BadCheckpoint` unless all of ``markers``, which a trainer writes when a save is whole,
    are there and (unless ``lenient``) no older than any of the weights: then they are an earlier
    save's. Raises what the source does, too.
    """
    files = source.files()
    for marker in markers:
        if marker not in files:
            raise BadCheckpoint(
                source.uri,
                f"{marker} is not in it: the save is not finished, or broke off",
                "wait for the trainer, or publish without --require",
            )
        marked_ns = source.status(marker).st_mtime_ns
        for name in () if lenient else checkpoint.headers:
            if source.status(name).st_mtime_ns > marked_ns:
                raise BadCheckpoint(
                    source.uri,
                    f"{marker} is older than {name}: it is of an earlier save",
                    f"wait for the trainer; if the folder was copied: touch {marker}, or --lenient",
                )


def notes(source: FileSource, checkpoint: Checkpoint) -> list[str]:
    """What somebody should know before nodes are told to read the folder, a sentence each. Raises
    what the source does.
    """
    weights = {name: source.status(name) for name in checkpoint.headers}
    others = {name: source.status(name) for name in checkpoint.side_files}
    said = [
        permissions.hidden_from_agents({"the folder": source.status(""), **weights, **others}),
        _mixed(weights, [status for name, status in others.items() if name.endswith(INDEX_ENDING)]),
    ]
    return [text for text in said if text]


def _mixed(weights: dict[str, stat_result], indices: Sequence[stat_result]) -> str:
    """An index is written after the shards: some before and some after it are of two saves."""
    for index in indices:
        newer = [name for name, at in weights.items() if at.st_mtime_ns > index.st_mtime_ns]
        older = [name for name, at in weights.items() if at.st_mtime_ns < index.st_mtime_ns]
        if newer and older:
            return (
                f"{newer[0]} is newer than the index, {older[0]} is older: if a save over an "
                "earlier one broke off or still runs, these are weights of two versions. Have the "
                "trainer save into a new folder, and publish with --require its last file"
            )
    return ""
