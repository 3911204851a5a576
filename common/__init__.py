"""What server and hospitals must agree on. Imports neither of them."""

from common.text import guard_logs

guard_logs()
