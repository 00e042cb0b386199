"""The command line: parse, call, return a Result; only `output.py` prints."""
