"""Where a coordinator's state outlives a process: memory (it does not) or Redis."""
