"""``kubectl hotweights``: what rollouts do, why they wait, and what somebody asks of them.

The plugin is a client like any other: it reads objects with the rights of whoever calls it, writes
the annotation ``hotweights.dev/command`` and nothing else, and decides nothing. What it shows is
made in `views`, out of what was read; this folder asks, waits and prints.
"""
