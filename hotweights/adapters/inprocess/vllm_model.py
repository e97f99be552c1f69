"""A model of vLLM's, whose parameters are not the checkpoint's tensors: the plugin's own machinery
decides and loads.

`compatibility` asks the model's loaders whether a version fits, `shadow` loads and finishes it
beside the running model (fused, repacked and tied weights, experts), and the switch here copies
what `shadow` made, with the way back and the reading back of `torch_model`. A model that cannot be
finished beside the running one is refused: `install_autobind` can update it, because it may pause
the engine and repair it.
"""

from __future__ import annotations

from typing import Any

import torch

from hotweights.adapters.inprocess import torch_model
from hotweights.adapters.inprocess.errors import NotApplied
from hotweights.adapters.inprocess.version import Version
from hotweights.adapters.vllm.rank.fit.compatibility import Compatibility
from hotweights.adapters.vllm.rank.shadow.changes import Unsupported
from hotweights.adapters.vllm.rank.shadow.model import Shadow
from hotweights_common.reasons import Reason


class VllmModel:
    """The model of one rank. To be made on the thread that runs it: constructors of models depend
    on global settings.
    """

    def __init__(self, module: torch.nn.Module, vllm_config: Any) -> None:
        """Raises `NotApplied` for a model that cannot be updated so."""
        device = next(module.parameters()).device
        if device.type == "cpu" and not vllm_config.model_config.enforce_eager:
            text = (
                "on CPUs a compiled model keeps the weights that it was compiled with: set "
                "enforce_eager=True"
            )
            raise NotApplied(Reason.UNSUPPORTED, text)
        self._shadow = _shadow(module, vllm_config, device)
        # A skeleton of its own: asking what fits must not disturb a version that is ready.
        self._compatibility = Compatibility(vllm_config, _shadow(module, vllm_config, device))

    def check(self, version: Version) -> None:
        """Whether the model's loaders take it, all of it. Raises `NotApplied`, which names the
        tensor.
        """
        misfit = self._compatibility.check(version)  # type: ignore[arg-type]  # it looks like an image
        if misfit is not None:
            raise NotApplied(misfit.reason, misfit.message)

    def prepare(self, version: Version) -> int:
        """Load and finish it beside the running model; gives the bytes to copy. Raises
        `NotApplied`. `check` has to have been called with it before: `Shadow.load` relies on it.
        """
        try:
            tensors = self._compatibility.tensors(version)  # type: ignore[arg-type]
            nbytes: int = self._shadow.load(
                tensors,
                self._compatibility.filled(version.digest),
                lambda: None,
                proven=self._compatibility.proven,
            )
            self._compatibility.keep_only([version.digest])
        except Unsupported as error:
            text = (
                f"this model cannot be finished beside the running one ({error}); use "
                "install_autobind"
            )
            raise NotApplied(Reason.UNSUPPORTED, text) from error
        # any model's loader may raise anything; what is served is untouched
        except Exception as error:
            # cut: a loader's error may show a whole tensor
            raise NotApplied(
                Reason.LOAD_FAILED, f"{type(error).__name__}: {error}"[:1000]
            ) from error
        return nbytes

    def discard(self) -> None:
        """Let go of a version that is not to be installed."""
        self._shadow.clear()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def switch(self) -> int:
        """Copy in place, read back, compare; on any error everything is as before. Gives the bytes
        copied.
        """
        moves = self._shadow.moves
        try:
            torch_model.install(moves)
            self._shadow.set_values()  # last: what has no way back comes after all that has
        finally:
            self._shadow.clear()
        return sum(new.nbytes for _, _, new in moves)


def _shadow(module: torch.nn.Module, vllm_config: Any, device: torch.device) -> Shadow:
    try:
        return Shadow(module, vllm_config, device)
    except Exception as error:  # any model's constructor may raise anything
        text = (
            f"no second model beside this one ({type(error).__name__}: {error}); use "
            "install_autobind"
        )
        # cut: it goes to the coordinator, and a constructor's error has no limit
        raise NotApplied(Reason.UNSUPPORTED, text[:1000]) from error
