"""Refusals of task vectors: a stable code for the other side, a text for one's own log."""

from __future__ import annotations

from common.errors import ConsiliumError


class VectorError(ConsiliumError):
    """A vector, a base or a merge is refused; nothing was changed.

    ``code`` is short and stable (``vector-…``, ``base-…``, ``merge-…``, ``registry-…``), one for
    each rule: it is what the hospital or the server on the other side is told. The text names
    hospitals, serials and public figures, never a value of a vector.
    """

    def __init__(self, code: str, what: str, remedy: str) -> None:
        """``code``: the rule; ``what``, ``remedy``: for one's own log."""
        super().__init__(what, remedy)
        self.code = code


def malformed(what: str) -> VectorError:
    """The refusal (``vector-format``) for bytes that are not what they should be."""
    return VectorError(
        "vector-format",
        f"a vector's or a base's bytes are malformed: {what}",
        "send them again; run the same version of consilium at the server and in every hospital",
    )
