"""What runs in vLLM's environment: it may import vLLM, the plugin's modules and the standard library."""
