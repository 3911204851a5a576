"""The asynchronous strategy, ``mode="vectors"``: task vectors whenever a hospital has one.

``strategy.py`` reads as the algorithm, ``letters.py`` says what hospitals are sent; ``run.py``
sets a run up and concludes it.
"""
