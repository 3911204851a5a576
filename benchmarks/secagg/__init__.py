"""Our secure aggregation against Flower's stock SecAgg+: CPU time, bytes, error; and one mask.

Both protocols run in this process, one after the other, on the same updates and weights, over
the same boundary: a RecordDict comes in, a RecordDict goes out, and each travels through
Flower's own serialisation, which is counted in bytes and charged to nobody. The stock one is
Flower's own code (SecAggPlusWorkflow, secaggplus_mod, legacy FedAvg), called through a Grid in
memory; nothing of it is written anew here.

:mod:`~benchmarks.secagg.case` says who takes part and with what, :mod:`~benchmarks.secagg.ours`
and :mod:`~benchmarks.secagg.stock` run one round of it, :mod:`~benchmarks.secagg.figures` is
what a round came to, :mod:`~benchmarks.secagg.cells` repeats, compares and keeps, and
:mod:`~benchmarks.secagg.masks` measures one mask by itself. What counts and what does not is in
benchmarks/README.md.
"""
