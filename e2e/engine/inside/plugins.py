"""Prints, as JSON, which plugins this vLLM loads: those of all groups that load unnamed, and its
endpoint plugins.
"""

from __future__ import annotations

import json

from vllm import envs, plugins

plugins.load_general_plugins()
endpoints = plugins.load_endpoint_plugins(("generate",))
envs.enable_envs_cache()  # as vLLM does once its engine is there: what is cached counts no less
again = plugins.load_endpoint_plugins(("generate",))
groups = ("vllm.general_plugins", "vllm.platform_plugins")
print(
    json.dumps(
        {
            "unnamed": sorted(n for group in groups for n in plugins.load_plugins_by_group(group)),
            "endpoints": [plugin.name for plugin in endpoints],
            "again": [plugin.name for plugin in again],
        }
    )
)
