"""Moving bytes: from sources to a node, from node to node, and from a node's agent into an
engine.
"""
