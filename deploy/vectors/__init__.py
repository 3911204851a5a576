"""Task vectors by hand: pre-train a base, look at a run's vectors, publish, fine-tune offline.

:mod:`commands` are thin readings of their arguments; :mod:`pretrain`, :mod:`place` (which run is
meant), :mod:`offline` (a hospital without a server) and :mod:`text` do the work.
"""
