"""Inside a rank of vLLM: a second copy of the weights beside the served one, and the switch between
them.
"""
