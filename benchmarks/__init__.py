"""Benchmarks: each is a command (``python -m benchmarks.NAME``), its results are in results/."""
