"""The commands, one module for each or for a few that belong together. Their functions' docstrings
and their options' help are what people read with --help.
"""
