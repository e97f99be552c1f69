"""The other side of the wire: calls with a deadline, to whichever coordinator leads; events."""
