"""The coordinator's side: the ServerApp, its strategies, the run store and the report."""
