"""Measuring: one module for each kind of place that is asked (`prometheus`, `http`, `job`), the way
there (`client`, `addresses`), and who does it without keeping anybody waiting (`measurer`).
"""
