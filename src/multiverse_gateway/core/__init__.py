"""Every decision of the gateway, free of I/O, clocks and randomness."""
