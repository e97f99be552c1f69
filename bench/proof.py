"""What it costs a connection between agents that the one who is dialled proves itself first.

    python bench/proof.py [--rounds 300]

Connections over TCP on loopback, with and without the proof by turns, so that both see the same
machine: connect, be welcomed, get a manifest of two bytes, close. Medians are compared. Tokens are
let in without a review, so nothing but the proof lies between the two. Loopback has no distance:
between hosts a round trip comes on top.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import time

from hotweights_transports.peers.base import ChunkProvider, Identity
from hotweights_transports.peers.proof import ServerKey
from hotweights_transports.peers.registry import transport_for

MANIFEST = b"{}"
DIGEST = f"sha256:{hashlib.sha256(MANIFEST).hexdigest()}"
HERE = "tcp://127.0.0.1:0"


class OneManifest(ChunkProvider):
    def locate(self, blake3: str) -> None:
        return None

    def manifest(self, digest: str) -> bytes | None:
        return MANIFEST if digest == DIGEST else None


def connect_once(address: str, key: str) -> float:
    """Seconds."""
    began = time.perf_counter()
    with transport_for(address).connect(address, lambda: "bench", key=key) as client:
        client.fetch_manifest(DIGEST)
    return time.perf_counter() - began


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=300, help="connections of each kind")
    options = parser.parse_args(arguments)
    key = ServerKey()
    server = transport_for(HERE).listen(
        HERE, OneManifest(), lambda _token: Identity("bench"), prove=key.prove
    )
    found: dict[str, list[float]] = {"": [], key.public: []}
    with server:
        key.serves_at(server.address)
        for wanted in found:  # the first ones import and warm
            connect_once(server.address, wanted)
        for _ in range(options.rounds):
            for wanted, seconds in found.items():
                seconds.append(connect_once(server.address, wanted))
    without, with_proof = (statistics.median(seconds) * 1e6 for seconds in found.values())
    print(
        f"{options.rounds} connections each: {without:.0f} µs without a proof, "
        f"{with_proof:.0f} µs with one: {with_proof - without:.0f} µs more"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
