"""What the gateway says about itself: the log, its tail for the logs page, and metrics."""
