"""Refusals of the secure-aggregation core: a code for the server, a text for one's own log.

A hospital that refuses has revealed nothing: its machine is wiped before the error leaves
it. ``code`` is all that the server may be told. The text names hospitals, stages and
public parameters, and never a key, a share, a seed, a weight or a value of an update.
"""

from __future__ import annotations

from common.errors import ProtocolError


class Refusal(ProtocolError):
    """A rule of the protocol does not hold; the party that raises it stops the round.

    ``code`` is stable and short (``secagg-...``), one for each rule, so that tests and
    operators can tell the rules apart.
    """

    def __init__(self, code: str, what: str, remedy: str) -> None:
        """``code``: the rule, for the server; ``what``, ``remedy``: for one's own log."""
        super().__init__(what, remedy)
        self.code = code


def malformed(what: str) -> Refusal:
    """The refusal for bytes that are not a message of this protocol."""
    return Refusal(
        "secagg-malformed",
        f"A secure-aggregation message is malformed: {what}.",
        "Use the same version of consilium on the server and in every hospital.",
    )


def hostile(code: str, what: str) -> Refusal:
    """The refusal for what no honest server sends."""
    return Refusal(
        f"secagg-{code}",
        f"{what}.",
        "Start a new round; if it comes again, treat the server as hostile.",
    )
