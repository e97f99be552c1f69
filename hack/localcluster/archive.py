"""A container image of one layer, written as the archive that `docker save` would write.

It needs no image tools, so the pause image can be made wherever the control plane's binaries can.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path


def write_image(path: Path, name: str, files: Mapping[str, bytes], entrypoint: list[str]) -> None:
    """Write an image with these executable files, without anything else in it."""
    layer = _tar({name: (content, 0o755) for name, content in files.items()})
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": entrypoint},
            "rootfs": {
                "type": "layers",
                "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"],
            },
        }
    ).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = json.dumps(
        [{"Config": config_name, "RepoTags": [name], "Layers": ["layer.tar"]}]
    ).encode()
    members = {config_name: config, "layer.tar": layer, "manifest.json": manifest}
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_bytes(_tar({name: (content, 0o644) for name, content in members.items()}))
    unfinished.rename(path)


def _tar(members: Mapping[str, tuple[bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, (content, mode) in members.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
