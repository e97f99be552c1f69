"""The last metre: a staged version passes from the agent into the engines of its node."""
