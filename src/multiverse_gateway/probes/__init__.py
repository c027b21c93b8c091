"""One small file for each way to find out whether a server works."""
