"""Ours beside other engines on one CPU: `python -m benchmarks.peers prepare | run | report`."""
