"""What a private head on a prior's features reaches, without the federation around it."""
