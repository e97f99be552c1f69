"""What the agent keeps on the node's disk. Imports `session`."""
