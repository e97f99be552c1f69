"""Where a measurement may not go.

Whoever may write a rollout has the operator ask URLs, from the operator's place in the network. What
answers there to anybody who is near, such as a cloud's metadata service or the operator's own ports,
is refused: by the address that is connected to, since a name can lead anywhere.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network

from aiohttp import ThreadedResolver
from aiohttp.abc import AbstractResolver, ResolveResult

Network = IPv4Network | IPv6Network


class AddressRefused(OSError):
    """An address that no measurement may go to; it says which, and by which setting."""


def networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Networks as they are written. Raises `ValueError` for one that is none."""
    return tuple(ipaddress.ip_network(text) for text in texts)


class Guard(AbstractResolver):
    """Resolves names to addresses that are allowed; asked about addresses too."""

    def __init__(self, refused: Sequence[Network]) -> None:
        self._refused = tuple(refused)
        self._resolver = ThreadedResolver()

    def check(self, host: str) -> None:
        """Raises `AddressRefused` if the host is such an address; a name passes, for `resolve`."""
        try:
            # a link-local address has its interface behind a percent sign
            address = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return
        if address.version == 6 and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        for network in self._refused:
            if address.version == network.version and address in network:
                raise AddressRefused(
                    f"{host} lies in {network}, where no measurement may go (the chart's value "
                    "analysis.refusedNetworks): name a host of the cluster"
                )

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """As the system does. Raises `AddressRefused` if any of the addresses is refused."""
        found = await self._resolver.resolve(host, port, family)
        for one in found:
            self.check(str(one["host"]))
        return found

    async def close(self) -> None:
        """Nothing is kept."""
        await self._resolver.close()
