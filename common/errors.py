"""Errors in two parts: what is wrong, and what to do about it.

Every error that a user can meet derives from :class:`ConsiliumError`. ``what`` names the
thing at fault (the file, the key, the hospital), ``remedy`` says what to do. Neither may
ever carry a secret: both reach logs, and ``code`` reaches the server. Both are one printable line
(:func:`common.text.printable`), whatever names the other side put into them.
"""

from __future__ import annotations

from common.text import printable


class ConsiliumError(Exception):
    """What is wrong (``what``) and what to do (``remedy``).

    ``code`` is a short stable identifier: the only part of a hospital's error that its
    server is told (with a correlation id); the text stays in the hospital's own log.
    """

    code = "error"

    def __init__(self, what: str, remedy: str) -> None:
        self.what = printable(what)
        self.remedy = printable(remedy)
        super().__init__(self.what, self.remedy)

    def __str__(self) -> str:
        return f"{self.what}\n  What to do: {self.remedy}"


class ConfigError(ConsiliumError):
    """A run-config key is unknown, of the wrong type, out of range or in conflict."""

    code = "config"


class DataError(ConsiliumError):
    """A data set, an image or a label is missing, unreadable or inconsistent."""

    code = "data"


class PartitionError(ConsiliumError):
    """A data set cannot be divided among the hospitals as asked."""

    code = "partition"


class ModelError(ConsiliumError):
    """A model cannot be built, or weights do not fit it."""

    code = "model"


class PrivacyError(ConsiliumError):
    """Something would break the differential-privacy guarantee; nothing was trained."""

    code = "privacy"


class ProtocolError(ConsiliumError):
    """A message is malformed, of another version, another run or another round."""

    code = "protocol"


class FixedMissing(ProtocolError):
    """A message leaves out entries of the model that the hospital does not have."""

    code = "fixed-missing"


class RoundError(ConsiliumError):
    """A round could not meet its quorum or its reconstruction threshold."""

    code = "round"
