"""The loop around the decisions: watches, cache, queue, writes. Imports `decide` and `model`; kopf
in `handlers` alone.
"""
