"""Training steps on a GPU that are recorded once and replayed: a small network's step is otherwise
mostly the time that it takes to tell the GPU what to do.
"""
