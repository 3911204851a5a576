"""The parts of a run's report that both modes share, and the page of a fedavg run.

``files`` reads the run's directory, ``values`` takes what may be anything for what it should be,
``formats`` writes figures, ``drawing`` makes a picture an element of the page, ``page`` is the
frame, the style and the macros. Entry: :func:`server_app.report.write_report`.
"""
