"""The face: command line and what runs inside vLLM."""
