"""The socket to the engines of this node: who may connect, frames in and out, and for how long.
Imports `session` and the handoff.
"""
