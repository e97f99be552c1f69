"""The node: stages versions and hands them to the engines of its pods."""
