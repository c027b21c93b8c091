"""What a request and a streamed chunk cost: the gateway beside nginx on one machine."""
