"""From the client to a server and back: the exchange, the wire and the doors."""
