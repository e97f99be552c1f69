"""One node of a test, a program: starts its proxy from a launch line and takes part in broadcasts.

Usage: ``node.py LINE SLOTS BYTES BUCKETS``; rank 0 sends bucket n full of the byte n. Prints the
rank and what it saw.
"""

from __future__ import annotations

import sys

from hotweights_transports.broadcast.hydra import find
from hotweights_transports.broadcast.launch_line import command, parse_launch
from hotweights_transports.broadcast.rank_process import RankProcess


def main() -> None:
    launch = parse_launch(sys.argv[1])
    slots, nbytes, buckets = (int(word) for word in sys.argv[2:])
    with RankProcess(
        command(launch, find().proxy, frozenset({"127.0.0.1"})), slots, nbytes
    ) as member:
        member.wait_ready(60)
        print("ready", flush=True)
        seen: list[int] = []
        for number in range(buckets):
            slot = number % slots
            with member.view(slot) as view:
                if member.rank == 0:
                    view[:nbytes] = bytes([number]) * nbytes
            member.post(slot, nbytes)
            assert member.completed(60) == slot
            with member.view(slot) as view:
                assert bytes(view[:nbytes]) == bytes([view[0]]) * nbytes
                seen.append(view[0])
        member.finish(60)
    print(launch.proxy_id, member.rank, member.size, *seen)


if __name__ == "__main__":
    main()
