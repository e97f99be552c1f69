"""What the agent says to the API server and hears from it. Imports `session` and
`hotweights_kube`.
"""
