"""One small file for each way to choose a server."""
