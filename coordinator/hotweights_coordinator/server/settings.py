"""How a coordinator serves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hotweights_coordinator.server.metrics import DEFAULT_PORT
from hotweights_coordinator.wire import address


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Where it is reached, who may ask, and how patient it is."""

    endpoint: str = address.DEFAULT_ENDPOINT
    events_endpoint: str = ""
    """Empty: the next port."""
    advertise: str = ""
    """How others reach it; empty: as ``endpoint`` says."""
    instance_id: str = "coordinator"
    token: str = ""
    """Empty: nobody is asked for one."""
    curve: Path | None = None
    """Folder of keys; None: the sockets are plain."""
    metrics_port: int = DEFAULT_PORT
    """0: any."""
    worker_ttl_seconds: float = 15.0
    """How long a worker may be silent."""
    origin_readers: int = 1
    """How many workers read the source at the same time."""
