"""Checks that run under vLLM's Python, because they need torch; `test_seed_adapters` runs them
there with this project's pytest.
"""
