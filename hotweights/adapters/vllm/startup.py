"""The bundle's ``sitecustomize``: Python runs it at its start, in every process of a container that
has the bundle on its path, before vLLM reads VLLM_PLUGINS.

That variable is an allow-list for plugins of every kind. What an image sets there can be seen by
nobody outside of its container, and would be replaced by a value from outside: so our names are
added here, to whatever there is. Where it is not set, all plugins load that need not be named, and
it stays so, because any value would switch them off; `plugin` sees to ours that must be named.
Another ``sitecustomize``, which this one hides, runs after it. Python prints what fails in either
(``site.execsitecustomize``) and starts all the same.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec


def allow_list(current: str) -> str:
    """A value of VLLM_PLUGINS with our names in it."""
    from hotweights.adapters.vllm import ENDPOINT_PLUGIN, GENERAL_PLUGIN

    names = [name.strip() for name in current.split(",")]
    ours = [name for name in (GENERAL_PLUGIN, ENDPOINT_PLUGIN) if name not in names]
    # the others' as they are: vLLM strips nothing, and who loads is not for us to change
    return ",".join([current, *ours] if current else ours)


def _add_our_names() -> None:
    listed = os.environ.get("VLLM_PLUGINS")
    # without an agent to talk to, the plugin does nothing
    if listed is not None and os.environ.get("HOTWEIGHTS_SOCKET"):
        os.environ["VLLM_PLUGINS"] = allow_list(listed)


def _run_the_next_one() -> None:
    """The ``sitecustomize`` that Python would have found without this one."""
    here = os.path.realpath(os.path.dirname(__file__))  # noqa: PTH120 - pathlib is slow to import
    # of all of ours that ran: two bundles on one path would call each other without end
    ran = getattr(sys, "hotweights_startups", frozenset()) | {here}
    sys.hotweights_startups = ran  # type: ignore[attr-defined]
    others = [entry for entry in sys.path if os.path.realpath(entry) not in ran]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module  # as if it were the first
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    _add_our_names()
    _run_the_next_one()
