"""Who of several processes leads, by a Lease (coordination.k8s.io/v1) that all of them write to.

`Election` is one process's side of it, without I/O and without a clock: it is told what the object
says and what came of a write, and says what to write next and for how long this process leads. The
rules are those of client-go's leader election (k8s.io/client-go/tools/leaderelection):

- A term is counted by the clock of whoever waits for it to end, from when a change of the object
  was seen there; times that another machine wrote are for people.
- A leader counts from before it asked, so its own term ends sooner than any other's count of it.
- A leader begins no write of its own `Timing.renew_seconds` after it renewed last; what it has
  begun then has until `Timing.lease_seconds` to be answered.
- Every write is fenced by the resourceVersion, so of two who take a free lease one is refused.

In one point it is stricter: an object that this process did not write, though it leads, ends its
lead, whatever name stands there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from hotweights_common import timestamps
from hotweights_kube.resources import LEASES, Body, version_of


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a lease holds; in seconds. The defaults are those of Kubernetes' own controllers."""

    lease_seconds: float = 15.0
    """For so long nobody else takes it after it was renewed."""
    renew_seconds: float = 10.0
    """Who could not renew for so long leads no more."""
    retry_seconds: float = 2.0
    """Between two tries to take or to renew it."""

    def __post_init__(self) -> None:
        """Raises ValueError where a leader could be followed before it has noticed."""
        if not 0 < self.retry_seconds < self.renew_seconds < self.lease_seconds:
            raise ValueError(
                f"a lease needs retry < renew < lease, not {self.retry_seconds:g}, "
                f"{self.renew_seconds:g}, {self.lease_seconds:g} s"
            )


@dataclass(slots=True)
class Election:
    """One process's view of a lease; ``now`` is always its own monotonic clock, in seconds."""

    identity: str  # nobody else may have it while this process lives
    timing: Timing = field(default_factory=Timing)
    holder: str = ""
    """Who held it when it was seen last; empty: nobody."""
    transitions: int = 0
    """How often it was taken so far."""
    taken_from: str = ""
    """Who held this process's term before it, and did not give it up; empty: nobody."""
    _known: Body | None = None
    _changed_at: float = 0.0  # when another version of it was seen for the first time
    _asked: tuple[Body, float] = field(default=({}, 0.0))  # the last write's spec; when it began
    _renewed_at: float | None = None  # None: this process does not lead

    @property
    def exists(self) -> bool:
        """Whether there is such an object, as far as it was seen."""
        return self._known is not None

    def observed(self, body: Body | None, now: float) -> None:
        """What the object says, as it was read; None: there is none."""
        if body is not None and self._known and version_of(body) == version_of(self._known):
            return
        asked = self._asked[0]
        if body is not None and asked and body.get("spec") == asked:
            self.renewed(body)  # our own write, of which the answer was lost
            return
        self._renewed_at = None  # if this process led, somebody else has written since
        self._note(body, now)

    def ask(
        self, name: str, namespace: str, now: float, at: datetime, *, release: bool = False
    ) -> Body:
        """The object to write, fenced by what was seen: this process's term, or (``release``) that
        there is none any more. ``at`` is the time of day, for people.
        """
        spec = dict((self._known or {}).get("spec") or {})
        moment = timestamps.show_micros(at)
        if self._renewed_at is None:
            spec |= {"acquireTime": moment, "leaseTransitions": self.transitions + 1}
        spec |= {
            "holderIdentity": "" if release else self.identity,
            # Kubernetes takes whole seconds, at least one
            "leaseDurationSeconds": 1 if release else max(1, round(self.timing.lease_seconds)),
            "renewTime": moment,
        }
        self._asked = (spec, now)
        metadata = {"name": name, "namespace": namespace}
        if self._known is not None:
            metadata["resourceVersion"] = version_of(self._known)
        return {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": metadata,
            "spec": spec,
        }

    def renewed(self, body: Body) -> None:
        """What was asked last is so: the term counts from when it was asked."""
        began_at = self._asked[1]
        if self._renewed_at is None:
            self.taken_from = self.holder
        self._note(body, began_at)
        self._renewed_at = began_at if self.holder == self.identity else None

    def resign(self) -> None:
        """This process leads no more, whatever the object says."""
        self._renewed_at = None

    def may_try(self, now: float) -> bool:
        """Whether the lease is this process's to renew or to take."""
        if self.holder in ("", self.identity):
            return True
        spec = (self._known or {}).get("spec") or {}
        # theirs, where they wrote a longer one than ours
        seconds = max(float(spec.get("leaseDurationSeconds") or 0), self.timing.lease_seconds)
        return now >= self._changed_at + seconds

    def lead_seconds(self, now: float) -> float:
        """For how long this process may still begin to write, unless it renews; 0: it does not
        lead.
        """
        return self._left(self.timing.renew_seconds, now)

    def safe_seconds(self, now: float) -> float:
        """For how long at least nobody else may lead; 0: it does not lead."""
        return self._left(self.timing.lease_seconds, now)

    def _left(self, seconds: float, now: float) -> float:
        return 0.0 if self._renewed_at is None else max(0.0, self._renewed_at + seconds - now)

    def _note(self, body: Body | None, now: float) -> None:
        spec = (body or {}).get("spec") or {}
        self._known, self._changed_at = body, now
        self.holder = str(spec.get("holderIdentity") or "")
        self.transitions = int(spec.get("leaseTransitions") or 0)
