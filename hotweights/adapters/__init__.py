"""What runs inside an inference engine. Imports the standard library, torch, vllm and the handoff
wire, nothing else.
"""
