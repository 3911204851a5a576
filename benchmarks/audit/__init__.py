"""Does the private trainer keep its ε, and would an audit notice if it did not?

:mod:`~benchmarks.audit.statistics` turns hits and misses into lower bounds on ε,
:mod:`~benchmarks.audit.trainers` has the real trainer and planted bugs,
:mod:`~benchmarks.audit.attack` looks for one canary in many runs,
:mod:`~benchmarks.audit.one_run` for many canaries in one run,
:mod:`~benchmarks.audit.membership` for images in a model's outputs, and
:mod:`~benchmarks.audit.cells` says what is run. What each figure means and assumes is in
benchmarks/README.md.
"""
