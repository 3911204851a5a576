"""What server and hospitals must agree on. Imports neither of them."""
