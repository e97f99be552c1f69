"""Arithmetic of versions, deltas, buckets and routes. Pure: no I/O, no clock, no randomness."""
