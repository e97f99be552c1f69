"""The decisions: pure functions from what is observed to the next step. Imports `model` and the
planner.
"""
