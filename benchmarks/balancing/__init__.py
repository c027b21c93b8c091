"""How long users wait for a first token under each balancer: simulated hosts behind the real gateway's decisions."""
