"""What a coordinator decides: pure rules over its state, and who is present."""
