"""Differential privacy: accounting, calibration, secure randomness, the guard, the engine.

Imports no Flower. ε here is always of the whole training, all rounds composed, under
add-or-remove-one neighbouring and Poisson sampling, and is the larger of two independent
accountants' figures.
"""

from common.privacy.accounting import Epsilon, Event, calibrate, epsilon_of

__all__ = ["Epsilon", "Event", "calibrate", "epsilon_of"]
