"""Where checkpoints are read from: one module per kind of place, one registry over them."""
