"""Engines that cannot be updated while they run are told so in one sentence with the remedy."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hotweights.adapters.vllm.plugin import BACKEND
from hotweights.adapters.vllm.suitability import caveat, unsuitable


class Base:
    def reset_cache(self) -> None: ...


class Forgets(Base):
    def reset_cache(self) -> None: ...


class KeepsAll(Base): ...


@pytest.fixture(autouse=True)
def _connectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's two modules that the question of connectors needs, as far as it needs them."""
    package = "vllm.distributed.kv_transfer.kv_connector"
    found = {"Forgets": Forgets, "KeepsAll": KeepsAll}
    factory, base = ModuleType(f"{package}.factory"), ModuleType(f"{package}.v1.base")
    factory.KVConnectorFactory = SimpleNamespace(  # type: ignore[attr-defined]
        get_connector_class=lambda config: found[config.kv_connector]
    )
    base.KVConnectorBase_V1 = Base  # type: ignore[attr-defined]
    for module in (factory, base):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def config(**changed: Any) -> Any:
    """An engine that is taken, but for what is ``changed`` (part__name=value)."""
    made = SimpleNamespace(
        parallel_config=SimpleNamespace(
            data_parallel_size=1, nnodes=1, distributed_executor_backend="mp"
        ),
        model_config=SimpleNamespace(runner_type="generate"),
        kv_transfer_config=None,
        weight_transfer_config=SimpleNamespace(backend=BACKEND),
    )
    for path, value in changed.items():
        part, _, name = path.partition("__")
        if name:
            setattr(getattr(made, part), name, value)
        else:
            setattr(made, part, value)
    return made


def test_an_ordinary_engine_is_taken() -> None:
    assert unsuitable(config()) == ""
    forgets = SimpleNamespace(kv_connector="Forgets")
    assert unsuitable(config(kv_transfer_config=forgets)) == ""


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"parallel_config__data_parallel_size": 2}, "--data-parallel-size 1"),
        ({"parallel_config__enable_eplb": True}, "without --enable-eplb"),
        ({"parallel_config__nnodes": 2}, "spread over several nodes"),
        ({"parallel_config__distributed_executor_backend": "ray"}, "spread over several nodes"),
        ({"model_config__runner_type": "pooling"}, "a switch of a pooling model"),
        (
            {"kv_transfer_config": SimpleNamespace(kv_connector="KeepsAll")},
            "KeepsAll cannot forget",
        ),
        ({"weight_transfer_config": None}, "remove the argument"),
        ({"weight_transfer_config__backend": "nccl"}, "backend 'nccl'"),
    ],
)
def test_what_cannot_be_updated_is_told_why(changed: dict[str, Any], words: str) -> None:
    told = unsuitable(config(**changed))
    assert words in told
    assert "\n" not in told


def test_one_api_server_is_needed() -> None:
    assert "--api-server-count 1" in unsuitable(config(), api_servers=2)


@pytest.mark.parametrize("method", ["eagle3", "draft_model", "mtp", "medusa"])
def test_a_draft_model_is_said_to_stay_as_it_is(method: str) -> None:
    said = caveat(config(speculative_config=SimpleNamespace(method=method)))
    assert f"draft model ({method}) keeps the weights" in said
    assert "restart the pod" in said


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_who_guesses_without_weights_keeps_none(method: str) -> None:
    assert caveat(config(speculative_config=SimpleNamespace(method=method))) == ""
    assert caveat(config()) == ""
