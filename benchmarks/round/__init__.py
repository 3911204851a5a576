"""Whole rounds: how much of a round's wall time is not training, and where that goes.

:mod:`~benchmarks.round.probe` notes when the product's functions ran, by wrapping them in the
processes that the benchmark starts; nothing in the product knows of it.
:mod:`~benchmarks.round.child` is a whole run in one process (the in-process grid) with the profile
of its last round; :mod:`~benchmarks.round.places` starts it, a simulation or real processes;
:mod:`~benchmarks.round.figures` makes rows of what was noted. What counts is in
benchmarks/README.md.
"""
