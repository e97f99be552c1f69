"""The simulated world: API server, kubelets, agents, engines, operators. It knows the truth."""
