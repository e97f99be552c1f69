"""Node to node: a node pulls chunks of a version from nodes that hold them or are fetching them
themselves.
"""
