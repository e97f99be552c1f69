"""Facts in, text out: what the plugin says of the objects that it was given. No I/O, no clock."""
