"""A coordinator's status as people read it: one line, a page, an event."""

from __future__ import annotations

import time
from typing import Any

from hotweights.commands.options import counted
from hotweights_coordinator.state.state import named

MOST_WORKERS_SHOWN = 20  # a page; --json has them all


def summary(result: dict[str, Any]) -> str:
    """One line out of the answer to ``status``."""
    what = f"{result['version']} is {result['state']}" if result["version"] else "idle"
    parts = [f"{what} (token {result['token']})", counted(len(result["workers"]), "worker")]
    if result["waiting_for"]:
        parts.append(f"waiting for {named(result['waiting_for'])}")
    if result["reason"]:
        parts.append(result["reason"])
    current = result["current"]
    parts.append(f"current {current['version']}" if current else "nothing is current")
    return "; ".join(parts)


def page(result: dict[str, Any], workers: list[dict[str, Any]]) -> list[str]:
    """The lines of a page, out of the answers to ``status`` and ``list_workers``."""
    current, role = (
        result["current"],
        "leads" if result["leads"] else f"follows {result['leader'] or 'nobody'}",
    )
    submitted = result["submitted"]
    lines = [
        f"coordinator  {result['instance_id']} {role}, backend {result['backend']}, up "
        f"{_age(result['uptime_seconds'])}",
        f"state        {result['state']}"
        + (f" {result['version']}, token {result['token']}" if result["version"] else ""),
        f"current      {current['version']} {current['digest']}, token {current['token']}"
        if current
        else "current      none",
        f"plan         {submitted['version']} {submitted['digest']}"
        if submitted
        else "plan         none",
    ]
    start = result["plans_from"]
    if start and start["digest"] != (current["digest"] if current else ""):
        lines.append(f"plans from   {start['version']} {start['digest']}, set by hand")
    if result["reason"]:
        lines.append(f"reason       {result['reason']}")
    if result["deadline_seconds"] is not None:
        lines.append(f"deadline     in {_age(result['deadline_seconds'])}")
    if result["waiting_for"]:
        lines.append(f"waiting for  {named(result['waiting_for'])}")
    applied = set(result["applied"] or ())
    has_applied = "applied not known" if result["applied"] is None else f"{len(applied)} applied"
    counts = f"{len(result['precommitted'])} precommitted, {has_applied}"
    lines.append(f"workers      {len(workers)}, {counts}, {engines_of(workers)}")
    for worker in workers[:MOST_WORKERS_SHOWN]:
        name = worker["worker_id"]
        marks = ["precommitted"] if worker["precommitted"] else []
        marks += ["applied"] if name in applied else []
        marks += [engines_of([worker])] if worker["engines"] is not None else []
        marks += [f"failed: {worker['failure']['reason']}"] if worker["failure"] else []
        silence = worker["silence_seconds"]  # None: the leader hears it
        said = "" if silence is None else f"heard {_age(silence)} ago"
        lines.append(f"  {name:<24} {worker['host']:<20} {said:<16} {', '.join(marks)}".rstrip())
    if len(workers) > MOST_WORKERS_SHOWN:
        lines.append(f"  and {len(workers) - MOST_WORKERS_SHOWN} more; --json lists all")
    lines.append("last events")
    lines += [
        f"  {_age(event['age_seconds']):>8} ago  {event['topic']:<10} {event['text']}"
        for event in result["last_events"]
    ]
    return lines


def engines_of(workers: list[dict[str, Any]]) -> str:
    """How many engines are connected by the workers' own word; without any a version is committed
    in memory alone.
    """
    said = [worker["engines"] for worker in workers if worker["engines"] is not None]
    if not said:
        return "engines not known"  # a follower has not heard it, and a replication has none
    return counted(sum(said), "engine") if sum(said) else "no engines"


def event_line(event: dict[str, Any]) -> str:
    """An event with its time in this host's zone; ``at`` is in seconds since 1970."""
    return (
        f"{time.strftime('%H:%M:%S', time.localtime(event['at']))}  {event['topic']:<10} "
        f"{event['text']}"
    )


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
