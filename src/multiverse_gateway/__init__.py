"""One dependable OpenAI-compatible service out of many undependable model servers."""
