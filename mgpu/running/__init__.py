"""Engines as running processes: start, prove, watch, stop."""
