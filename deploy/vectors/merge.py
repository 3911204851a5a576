"""Try a merge by hand: what waits in a run's registry, by any rule and scale."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from common.errors import ConfigError
from common.files import atomic_write
from common.vectors import choose_scale as choose
from deploy.vectors.place import Place


def merge(
    place: Place, rule_text: str, out: Path | None, choose_scale: bool, say: Callable[[str], None]
) -> None:
    """Say what the candidate is made of and how it validates; write it to ``out``.

    With ``choose_scale`` the scale of best validation is taken, or none if none beats the base by
    more than the margin. ConfigError where that needs public images and there are none.
    """
    rule, judge = place.rule(rule_text), place.judge()
    with place.open() as registry:
        proposal = registry.candidate(rule)
        count = len(proposal.ingredients)
        say(f"{count} vectors of {len(proposal.hospitals)} hospitals wait")
        if warning := rule.warning(max(count, 1)):
            say(f"WARNING: {warning}")
        if refusal := registry.refusal(proposal, skewed=place.skewed):
            say(f"not to be published: {refusal.what}")
        if judge is None:
            if choose_scale:
                raise ConfigError("there are no public images to choose a scale on",
                                  "set test-data in the run's configuration")  # fmt: skip
            say("no public images: it cannot be judged")
        else:
            before = judge(proposal.base.weights)
            if choose_scale:
                found = choose(
                    lambda scale: registry.candidate(rule.scaled(scale)).weights,
                    judge, base_accuracy=before, count=judge.count,
                    errors=place.config.publish_margin,
                )  # fmt: skip
                for scale, accuracy in found.table:
                    say(f"scale {scale:g}: {100 * accuracy:.1f} %")
                say(f"chosen: {found.scale:g} (margin {100 * found.margin:.1f} points)"
                    + ("" if found.scale else ": better not merge"))  # fmt: skip
                proposal = registry.candidate(rule.scaled(found.scale))
            say(f"validation: {100 * judge(proposal.weights):.1f} %, of the current base "
                f"{100 * before:.1f} % ({judge.count} public images)")  # fmt: skip
        if out is not None:
            weights = {k: np.asarray(v, order="C") for k, v in proposal.weights.items()}
            atomic_write(out, save(weights))
            say(f"written: {out}")
