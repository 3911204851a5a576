"""What both sides of a real deployment run on: processes kept alive, Flower made prompt.

:mod:`~deploy.runtime.supervisor` starts processes again when they end, and ends them together;
:mod:`~deploy.runtime.executor` runs Flower's apps by fork; :mod:`~deploy.runtime.flower` and
:mod:`~deploy.runtime.unix` are where settings and internals of Flower 1.41 are touched.
"""
