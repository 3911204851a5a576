"""The `consilium` command, and the ways to bring server and hospitals together."""

import common as _common  # noqa: F401  (its import guards the logs: common.text)
