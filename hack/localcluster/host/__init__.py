"""What a cluster of processes needs of this machine: control groups, mounts, networks, processes,
free slots.
"""
