"""The process that serves: calls in, replies and events out, metrics."""
