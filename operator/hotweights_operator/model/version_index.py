"""The WeightVersions, by each of the names that decisions know them by."""

from __future__ import annotations

from hotweights_operator.model.objects import Version


class VersionIndex:
    """All versions that are known, those being deleted included: what they hold is still served."""

    def __init__(self) -> None:
        self.by_uid: dict[str, Version] = {}
        self.unresolved: dict[str, Version] = {}
        """Those without a digest, by UID."""
        self.epoch = 0
        """Grows with every change."""
        # namespace and name, which come again
        self._by_name: dict[tuple[str, str], dict[str, Version]] = {}
        self._by_digest: dict[tuple[str, str], dict[str, Version]] = {}

    def named(self, namespace: str, name: str) -> Version | None:
        """A version by name, unless it is being deleted; None: there is none."""
        return next(
            (v for v in self._by_name.get((namespace, name), {}).values() if not v.terminating),
            None,
        )

    def of_digest(self, namespace: str, digest: str) -> Version | None:
        """Any version of the namespace with this digest, also one that is being deleted: its source
        is the same. None: there is none.
        """
        return next(iter(self._by_digest.get((namespace, digest), {}).values()), None)

    def put(self, value: Version) -> None:
        """A version is new or different. What it was known by before goes first."""
        self.drop(self.by_uid.get(value.uid, value))
        self.by_uid[value.uid] = value
        self._by_name.setdefault((value.namespace, value.name), {})[value.uid] = value
        if value.status.digest:
            self._by_digest.setdefault((value.namespace, value.status.digest), {})[value.uid] = (
                value
            )
        else:
            self.unresolved[value.uid] = value

    def drop(self, value: Version) -> None:
        """A version is gone; one that was never there changes nothing but the epoch."""
        self.epoch += 1
        self.by_uid.pop(value.uid, None)
        self.unresolved.pop(value.uid, None)
        for index, name in (
            (self._by_name, (value.namespace, value.name)),
            (self._by_digest, (value.namespace, value.status.digest)),
        ):
            index.get(name, {}).pop(value.uid, None)
            if not index.get(name, {"": None}):
                del index[name]
