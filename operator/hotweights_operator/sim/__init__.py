"""A cluster in memory, with faults and stale reads, around the real decisions. See
`hotweights_operator.simulate`.
"""
