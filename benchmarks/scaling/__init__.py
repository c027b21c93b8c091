"""What grows with gateways, servers and requests on one PostgreSQL: measured, and simulated past what one machine can run."""
