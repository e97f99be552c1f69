"""The environment is the only configuration, so a value that cannot be meant is named."""

from __future__ import annotations

import pytest

from hotweights.adapters.vllm import settings


def test_without_a_socket_the_plugin_does_nothing() -> None:
    assert settings.read({}).socket == ""


def test_the_defaults_hold_the_port() -> None:
    read = settings.read({"HOTWEIGHTS_SOCKET": "/s"})
    assert (read.hold, read.boot_timeout_seconds, read.repair_seconds) == (True, 120.0, 300.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HOTWEIGHTS_BOOT_POLICY", "Maybe"),
        ("HOTWEIGHTS_BOOT_TIMEOUT_SECONDS", "soon"),
        ("HOTWEIGHTS_BOOT_TIMEOUT_SECONDS", "0"),
        ("HOTWEIGHTS_REPAIR_SECONDS", "nan"),
        ("HOTWEIGHTS_PREPARE_SHARE", "-1"),
    ],
)
def test_a_value_that_cannot_be_meant_is_named(name: str, value: str) -> None:
    with pytest.raises(settings.SettingsError, match=name):
        settings.read({name: value})
