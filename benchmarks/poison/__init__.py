"""What hospitals that lie do to a run's model, with the defence and without: see __main__."""
