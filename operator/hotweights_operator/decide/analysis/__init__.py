"""What is measured of a canary: which metrics a step has (`step`), with its arguments in place
(`arguments`), what a value means (`expressions`), and what all of them together say (`judge`).
"""
