"""One module an engine: from plan to command line, from log lines and metrics to values."""
