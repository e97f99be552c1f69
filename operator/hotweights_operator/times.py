"""Points in time as Kubernetes writes them. Nothing here asks a clock."""

from __future__ import annotations

from datetime import UTC, datetime


def parse(text: str | None) -> datetime | None:
    """RFC 3339 to a moment; None for what is empty or is none."""
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def show(moment: datetime) -> str:
    """RFC 3339 in whole seconds, as Kubernetes' own conditions have it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
