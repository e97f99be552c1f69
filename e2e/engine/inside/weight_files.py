"""What a cold vLLM would read of checkpoint folders, by its own choice of files and its own
iterator: run by vLLM's Python. Folders (a JSON list) come in, and by folder go out
`[name, dtype, shape]` of each tensor in the order in which they come, or None where vLLM raises.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from safetensors import SafetensorError
from vllm.config import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator


def read(folder: str) -> list[tuple[str, str, list[int]]] | None:
    """The tensors of one folder, as ``--load-format auto`` finds them."""
    loader = DefaultModelLoader(LoadConfig())
    try:
        _, files, is_safetensors, _ = loader._prepare_weights(folder, None, None, True, None)
        if not is_safetensors:
            return None
        return [
            (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            for name, tensor in safetensors_weights_iterator(files, False)
        ]
    except (OSError, RuntimeError, ValueError, SafetensorError):
        return None


found: dict[str, Any] = {folder: read(folder) for folder in json.load(sys.stdin)}
print(json.dumps(found))  # the last line; before it is vLLM's log
