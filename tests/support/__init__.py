"""Shared parts of the tests: real and misbehaving model servers, a fault proxy, a raw client, child processes."""
