"""The peers' protocol over any byte stream, with deadlines on every wait. TCP and UCX bring their
connections.
"""
