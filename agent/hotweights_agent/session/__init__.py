"""One node's decisions, without I/O: messages in, effects out. Imports models, frames and waits; no
socket, no file, no clock.
"""
