"""What passes between a coordinator and its clients: messages, addresses, who may ask, sockets."""
