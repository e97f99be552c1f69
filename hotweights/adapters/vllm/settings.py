"""What the pod's environment says to the plugin; nothing else configures it, because no command
line may be needed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


class SettingsError(ValueError):
    """A variable has a value that cannot be meant; the message says what it may be."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One process' settings, read by `read`. Times are in seconds."""

    socket: str
    """``HOTWEIGHTS_SOCKET``: the agent's socket. Empty: the plugin does nothing."""

    token_file: str
    """``HOTWEIGHTS_TOKEN_FILE``: the projected service-account token, read anew for each hello.
    Empty: none is sent.
    """

    hold: bool
    """``HOTWEIGHTS_BOOT_POLICY``: ``Hold`` (default) never serves what nobody assigned, ``Serve``
    does after the time-out.
    """

    boot_timeout_seconds: float
    """``HOTWEIGHTS_BOOT_TIMEOUT_SECONDS`` (120): how long the port stays closed before the policy
    decides.
    """

    repair_seconds: float
    """``HOTWEIGHTS_REPAIR_SECONDS`` (300): a dirty engine that is not repaired by then ends itself.
    Reads a whole model.
    """

    prepare_share: float
    """``HOTWEIGHTS_PREPARE_SHARE`` (0.3): the share of its time that preparing works; the rest
    belongs to serving.
    """


def read(environment: Mapping[str, str] = os.environ) -> Settings:
    """Raises `SettingsError`. An empty variable counts as one that is not set."""
    policy = environment.get("HOTWEIGHTS_BOOT_POLICY") or "Hold"
    if policy not in ("Hold", "Serve"):
        raise SettingsError(f"HOTWEIGHTS_BOOT_POLICY is {policy!r}; it may be Hold or Serve")
    return Settings(
        socket=environment.get("HOTWEIGHTS_SOCKET", ""),
        token_file=environment.get("HOTWEIGHTS_TOKEN_FILE", ""),
        hold=policy == "Hold",
        boot_timeout_seconds=_positive(environment, "HOTWEIGHTS_BOOT_TIMEOUT_SECONDS", 120.0),
        repair_seconds=_positive(environment, "HOTWEIGHTS_REPAIR_SECONDS", 300.0),
        prepare_share=_positive(environment, "HOTWEIGHTS_PREPARE_SHARE", 0.3),
    )


def _positive(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise SettingsError(f"{name} is {text!r}; it has to be a number above 0")
    return value
