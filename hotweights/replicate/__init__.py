"""One plan, once: its bytes into an image on this host, by whoever can bring them."""
