"""Whom this worker pulls from: the others as the coordinator names them, as endpoints that work
from here, the nearest first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import urlsplit

from pydantic import ValidationError

from hotweights.worker.assignments import MOST_PEERS, Member, Route
from hotweights_common.reasons import Reason
from hotweights_coordinator.wire.messages import CoordinatorError
from hotweights_crds.nodeweights import Peer
from hotweights_planner.nearest_donors import Spot, choose, nearest_first


class PeerSelection:
    """One worker among the others. ``schemes`` are the transports that work here, the preferred one
    first.
    """

    def __init__(self, worker_id: str, address: str, zone: str, schemes: Sequence[str]) -> None:
        self._here = Spot(worker_id, address, zone)
        self._schemes = tuple(schemes)

    def chain(self, parents: Iterable[Member], fallbacks: Iterable[Member]) -> Route:
        """As the coordinator planned it, for everybody at once."""
        return Route(tuple(self._peers(parents)), tuple(self._peers(fallbacks)))

    def donors(self, listed: object) -> Route:
        """Stripes from the nearest of those who have a version; the others stand by. ``listed`` is
        the coordinator's answer as it came. Raises `CoordinatorError` where it is no list of
        workers.
        """
        by_name = {member.worker_id: member for member in self._members(listed)}
        spots = [self._spot(member) for member in by_name.values()]
        if not spots:  # nobody has it yet: the source gives it
            return Route()
        near = [spot.name for spot in choose(self._here, spots, at_most=MOST_PEERS)]
        rest = [spot.name for spot in nearest_first(self._here, spots) if spot.name not in near][
            :MOST_PEERS
        ]
        return Route(
            tuple(self._peers(by_name[name] for name in near)),
            tuple(self._peers(by_name[name] for name in rest)),
        )

    def everybody(self, listed: object) -> Route:
        """All others: who has a chunk, or is about to read it, gives it. Raises as `donors`."""
        by_name = {member.worker_id: member for member in self._members(listed)}
        ordered = nearest_first(self._here, [self._spot(member) for member in by_name.values()])
        peers = self._peers(by_name[spot.name] for spot in ordered)
        # the next nearest stand by; more of them would not be asked (`assignments`)
        return Route(tuple(peers[:MOST_PEERS]), tuple(peers[MOST_PEERS : 2 * MOST_PEERS]))

    def _members(self, listed: object) -> list[Member]:
        entries = listed if isinstance(listed, list) else []
        try:
            members = [
                Member.model_validate(entry) for entry in entries if isinstance(entry, Mapping)
            ]
        except ValidationError as error:
            raise CoordinatorError(
                "the coordinator's list of workers cannot be understood", Reason.BAD_ANSWER
            ) from error
        return [
            member
            for member in members
            if member.worker_id != self._here.name and self._endpoint(member)
        ]

    def _peers(self, members: Iterable[Member]) -> list[Peer]:
        found = [
            (member.worker_id, self._endpoint(member))
            for member in members
            if member.worker_id != self._here.name
        ]
        return [Peer(node=name, endpoint=endpoint) for name, endpoint in found if endpoint]

    def _endpoint(self, member: Member) -> str:
        """The one by the transport that we like best; empty: none that works here."""
        # reversed: of several by one transport the first that it named stays
        by_scheme = {urlsplit(endpoint).scheme: endpoint for endpoint in reversed(member.endpoints)}
        return next((by_scheme[scheme] for scheme in self._schemes if scheme in by_scheme), "")

    def _spot(self, member: Member) -> Spot:
        return Spot(member.worker_id, urlsplit(self._endpoint(member)).hostname or "", member.zone)
