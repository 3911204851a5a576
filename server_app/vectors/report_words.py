"""What a report of vectors says in words: what a code means, and what the run did not protect."""

from __future__ import annotations

from server_app.reporting.files import Run
from server_app.reporting.values import Json, count, text

KINDS = {
    "refused": "refused by the server",
    "refusal": "the hospital refused",
    "excluded": "excluded",
    "withdrawal": "taken back by the hospital",
}
# Codes of common/vectors/checks.py, and those that hospitals and the registry refuse with.
CODES = {
    "vector-format": "it is malformed, or was cut on the way",
    "vector-finite": "it has values that are no numbers",
    "vector-signature": "its signature is not the hospital's",
    "vector-hospital": "the hospital is not on the roster",
    "vector-base": "it is for no base of this run, or for one that was taken back",
    "vector-stale": "it is for too old a base",
    "vector-shape": "it is of another model",
    "vector-bucket": "it claims more images than is allowed",
    "vector-norm": "it is far larger than the others' vectors",
    "vector-serial": "another vector has its serial",
    "vector-withdrawn": "the hospital had taken it back",
    "vector-used": "the hospital's vector for that base is in a published one already",
    "vector-many": "the hospital sent its vector for that base anew too often",
    "vector-privacy": "it cost more privacy than the run promises",
    "vectors-policy": "its policy lets no such vector leave the house",
    "privacy-budget": "its ε budget does not allow another vector",
    "privacy-policy": "its policy does not allow the run's privacy settings",
    "policy": "its policy does not allow it",
    "registry-gate": "it was worse than the current base by more than the margin",
    "judging-waits": "it waits until enough hospitals can judge it",
    "judging-few": "too few hospitals can judge it",
    "judging-many": "too many candidates for one base: the hospitals judge no more of them",
    "registry-unchanged": "it was the current base to the last bit",
    "registry-quorum": "too few vectors waited",
    "merge-base": "vectors of random weights are not merged: measured to fail",
    "merge-few": "too few hospitals with different mixes of classes: measured to fail",
}


def unprotected(run: Run, *, private: bool, bare: int, several: int, judged: bool | None) -> Json:
    """What the page must say first: ``gaps`` as pairs of a title and a sentence.

    ``bare``: vectors without ε in a run that promised one; ``several``: most vectors of one
    hospital; ``judged``: whether bases were judged before they were published (None: no base was).
    """
    gaps = [(
        "Single vectors were not hidden from the server.",
        "Secure aggregation was off: it needs hospitals that answer together, and these do not. "
        "The server saw each hospital's vector by itself and keeps it in the run's folder.",
    )]  # fmt: skip
    if not private:
        gaps.append((
            "No differential privacy in this run.",
            "Nothing bounds what a vector, or the model, may reveal about a single image.",
        ))  # fmt: skip
    elif bare:
        gaps.append((
            f"{bare} vector{'s' if bare > 1 else ''} came without differential privacy.",
            "The run promised ε; nothing bounds what these may reveal about a single image.",
        ))  # fmt: skip
    if private and several > 1:
        gaps.append((
            "ε is for ONE vector.",
            f"A hospital that sent more has spent more: up to {several} vectors came from one. Its "
            "own ledger adds them up, with those of other runs.",
        ))  # fmt: skip
    roster = run.config.get("roster")
    if roster == "":
        gaps.append((
            "Hospitals were not authenticated.",
            "There was no roster: the first key that a hospital showed was believed, so whoever "
            "reached the server could have posed as one that had not come yet.",
        ))  # fmt: skip
    elif not isinstance(roster, str):
        gaps.append((
            "Whether hospitals were authenticated is not recorded.",
            "Take them for unauthenticated.",
        ))  # fmt: skip
    if judged is False:
        why = {
            "none": "judged-by was none", "hospitals": "it was published by hand",
        }.get(text(run.config.get("judged-by")), "there were no public images, or it was published "
                                                 "by hand")  # fmt: skip
        gaps.append((
            "New bases were published without being judged.",
            f"A vector that harms could have gone into one: {why}.",
        ))  # fmt: skip
    if run.config.get("base") == "" and count(run.summary.get("bases")):
        gaps.append((
            "The first base had random weights.",
            "Merging vectors of such a base was measured to fail.",
        ))  # fmt: skip
    return {"gaps": gaps}
