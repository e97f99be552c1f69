"""What puts new weights into a running vLLM: a plugin that stock images load from a folder on
``PYTHONPATH``.

``plugin`` is what vLLM finds. In every worker ``rank.engine`` talks to the node's agent through
``agent_connection``: it maps versions (``rank.image``), says whether they fit (``rank.fit.dry_load``),
and finishes them beside the running model (``rank.shadow``, else ``rank.reload``). In the API
server ``server`` holds the port until the right version serves (the boot barrier) and runs each
``commit``: pause, copy, ``probe``, resume. ``bundle`` writes the folder, ``startup`` has it loaded
whatever VLLM_PLUGINS says, ``golden`` records what a cold load answers. Imports: the standard
library, the handoff, and what every vLLM brings: torch, vllm, safetensors, psutil.
"""

PLUGIN_VERSION = "0.1.0"
GENERAL_PLUGIN = "hotweights"  # names of the entry points, as VLLM_PLUGINS lists them
ENDPOINT_PLUGIN = "hotweights_server"
