"""The `consilium` command, and the ways to bring server and hospitals together."""
