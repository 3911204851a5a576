"""Publish by hand what waits in a run's registry; who judged it, if anybody, is said aloud."""

from __future__ import annotations

from collections.abc import Callable

from common.errors import ConfigError
from common.vectors import Gate, no_gate
from deploy.vectors.place import Place

JUDGES = ("public", "none")
"""Who can judge a candidate that is published by hand: hospitals answer a running server only."""


def publish(place: Place, rule_text: str, judged_by: str, say: Callable[[str], None]) -> None:
    """Make what waits the next base, judged by ``judged_by``; empty: by whom the run's are.

    ConfigError for a run whose candidates its hospitals judge, unless ``judged_by`` says who is
    to do it instead, and where public images are asked for and the run has none. Where the run
    itself goes without (``judged-by=none``, no public images), so does this, and says so.
    VectorError: as :meth:`server_app.registry.Registry.publish`.
    """
    if judged_by and judged_by not in JUDGES:
        raise ConfigError(
            f"'{judged_by}' cannot judge what is published by hand",
            f"--judged-by takes {' or '.join(JUDGES)}",
        )
    by = judged_by or place.config.judged_by
    if by == "hospitals":
        raise ConfigError(
            "the run's candidates are judged by its hospitals (judged-by=hospitals), and this "
            "command cannot ask them: nothing is published",
            f"let the run do it (resume={place.directory.name}); or say who judges instead: "
            "--judged-by public, the run's public images, or --judged-by none, nobody",
        )
    gate, what = _gate(place, by, asked_for=bool(judged_by))
    with place.open() as registry:
        registry.publish(
            place.rule(rule_text), gate=gate, least=place.config.publish_quorum,
            skewed=place.skewed,
        )  # fmt: skip
        say(what)
        say(place.current(registry))


def _gate(place: Place, by: str, *, asked_for: bool) -> tuple[Gate, str]:
    """The gate, and what is to be said of it."""
    if by == "none":
        return no_gate, "judged-by=none: it is published WITHOUT being judged"
    judge = place.judge()
    if judge is not None:
        return place.gate(judge), f"judged on {judge.count} public images"
    if asked_for:
        raise ConfigError(
            "the run has no public images to judge by: nothing is published",
            "set test-data to the coordinator's own npz file in the next run, or say aloud that "
            "nobody judges it: --judged-by none",
        )
    return no_gate, "no public images: it is published WITHOUT being judged, as by the run itself"
