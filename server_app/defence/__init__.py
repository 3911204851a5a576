"""What the server notices of hospitals that lie, from opened sums alone (docs/poisoning.md).

* :mod:`~server_app.defence.sums`: what is judged of one opened sum: weight, norm, largest entry.
* :mod:`~server_app.defence.figures`: whether a model validates worse than the ones before.
* :mod:`~server_app.defence.suspects`: who harms, from which halves were harmed and which not.
* :mod:`~server_app.defence.updates`: the same where single updates are visible (secagg=false).
* :mod:`~server_app.defence.defence`: a run's state and decisions, which the round loop follows.

All but the last are pure. None of it sees more than the round does: nothing is asked of a hospital
that a round without it could not ask.
"""
