"""A public prior for small pictures of stained cells, learnt from drawn pictures alone."""
