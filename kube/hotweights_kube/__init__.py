"""A thin asynchronous face of the Kubernetes API for operator and agent."""
