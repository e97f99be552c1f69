"""How versions come into this node's memory and stay there: threads that fetch, a store that holds.
Imports `session`, storage and transports.
"""
