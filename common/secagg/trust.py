"""Whether a cohort is made of hospitals that this one has accepted, where it counts.

The roster says whom the coordinator has admitted. Whoever holds the coordinator's key can admit
hospitals that do not exist, and each of them is a colluder: three invented members and one victim
are a cohort of four, whose sum is the victim's own vector. So a hospital also goes by a list of its
own: the identity keys that its people have accepted.

Under ``accept_members="ask"`` nobody else may be in a cohort at all. Under ``"auto"`` others may,
and two things hold about those who were accepted (with ``min_trusted`` above 1; at 1 the
coordinator's word is all there is):

* The others in this hospital's neighbourhood are no more than the colluders that the threshold
  stands up to, ``min(2 t - k - 1, k - 2)`` of ``k`` holders (docs/secure-aggregation.md). They hold
  shares of its secrets, and by the keys of members that it invents the server can choose who is a
  neighbour.
* At least ``min_trusted`` accepted hospitals, this one included, are connected to it through each
  other. What connects them through the others are masks that whoever invented those knows, and so
  is no part of what hides this hospital's vector.
"""

from __future__ import annotations

from collections.abc import Collection

from common.secagg.errors import Refusal
from common.secagg.graph import CohortGraph
from common.secagg.params import SecAggParams, SecAggPolicy


def tolerated(threshold: int, holders: int) -> int:
    """How many of ``holders`` of a hospital's shares may collude, with threshold ``threshold``."""
    return max(0, min(2 * threshold - holders - 1, holders - 2))


def check_members(
    name: str,
    graph: CohortGraph,
    present: Collection[str],
    trusted: Collection[str],
    params: SecAggParams,
    policy: SecAggPolicy,
) -> None:
    """Refuse (``secagg-members``) what :mod:`common.secagg.trust` says must not be opened.

    name: this hospital. graph: of the whole cohort, those who dropped since included (they hold
    shares). present: whose vectors the sum would hold. trusted: names in the cohort whose identity
    keys this hospital has accepted; its own name need not be among them.
    """
    known = {name, *trusted}
    strangers = sorted(set(graph.neighbourhoods) - known)
    if policy.accept_members == "ask" and strangers:
        raise _refuse(
            f"{len(strangers)} in the cohort that this hospital has not accepted "
            f"({', '.join(strangers[:5])}{', …' if len(strangers) > 5 else ''})"
        )
    if policy.min_trusted <= 1:
        return
    near = graph.of(name)
    foreign = sorted(set(near) & set(strangers))
    if len(foreign) > tolerated(params.reconstruction_threshold, len(near)):
        raise _refuse(
            f"{len(foreign)} among the {len(near)} holders of its secrets that this hospital has "
            f"not accepted ({', '.join(foreign[:5])}): together they could open it"
        )
    joined = graph.reach(name, set(present) & known)
    if len(joined) < policy.min_trusted:
        raise _refuse(
            f"a sum in which {len(joined)} hospitals that it has accepted, itself included, are "
            f"joined by masks, and its policy asks for {policy.min_trusted}"
        )


def _refuse(what: str) -> Refusal:
    return Refusal(
        "secagg-members",
        f"The server asks this hospital to take part with {what}.",
        "See who waits with `consilium hospital members`, and accept whom you know; if nobody "
        "should have joined, ask the coordinator, and treat the server as hostile until then.",
    )
