"""The node agent on a host without Kubernetes: the same node, told by a coordinator what to do."""
