"""Who shares and masks with whom: a Harary ring, computed by every hospital for itself.

Bell et al. (CCS 2020), section 3: a k-regular graph in place of the complete one. The order
on the ring hashes the cohort hash, which covers the round, the parameters and everybody's
fresh public keys, so that it is unknown before all have advertised. In a cohort of at most
``num_shares`` hospitals, each is everybody's neighbour.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from common.secagg.binding import transcript
from common.secagg.errors import Refusal
from common.secagg.params import SecAggParams


@dataclass(frozen=True)
class CohortGraph:
    """Each hospital's neighbourhood: itself and its neighbours, sorted by name.

    A holder's share index is its place in the owner's neighbourhood, counted from 1.
    """

    neighbourhoods: Mapping[str, tuple[str, ...]]

    @classmethod
    def build(cls, names: Sequence[str], cohort_hash: bytes, params: SecAggParams) -> CohortGraph:
        """The graph of a cohort; ``names`` distinct. The result ignores their order."""
        if len(names) <= params.num_shares:
            everybody = tuple(sorted(names))
            return cls(dict.fromkeys(everybody, everybody))
        ring = sorted(names, key=lambda name: transcript("ring", cohort_hash, name))
        size, reach = len(ring), (params.num_shares - 1) // 2
        return cls(
            {
                name: tuple(sorted(ring[(place + d) % size] for d in range(-reach, reach + 1)))
                for place, name in enumerate(ring)
            }
        )

    def of(self, name: str) -> tuple[str, ...]:
        """The neighbourhood of ``name``, itself included."""
        return self.neighbourhoods[name]

    def index(self, owner: str, holder: str) -> int:
        """The index (from 1) of the share of ``owner``'s secrets that ``holder`` keeps."""
        return self.of(owner).index(holder) + 1

    def thin(self, owners: Collection[str], present: Collection[str], least: int) -> list[str]:
        """Those of ``owners`` with fewer than ``least`` of their neighbourhood in ``present``."""
        there = set(present)
        return sorted(
            owner for owner in owners if sum(name in there for name in self.of(owner)) < least
        )

    def reach(self, name: str, present: Collection[str]) -> set[str]:
        """Whom ``name`` is connected to in the graph restricted to ``present``, itself included."""
        left, front = set(present) - {name}, [name]
        found = {name}
        while front:
            near = [other for other in self.of(front.pop()) if other in left]
            left.difference_update(near)
            front.extend(near)
            found.update(near)
        return found

    def connected(self, present: Collection[str]) -> bool:
        """Whether the graph, restricted to ``present``, is in one piece."""
        return not present or len(self.reach(next(iter(present)), present)) == len(set(present))


def check_survivors(graph: CohortGraph, survivors: Collection[str], params: SecAggParams) -> None:
    """Refuse a set of survivors whose sum would not protect each of them.

    Enough of them (``secagg-survivors-few``), at least ``t`` in each one's neighbourhood
    (``secagg-survivors-thin``), and all connected by masks (``secagg-survivors-split``): a
    part that is cut off would be revealed as a sum of its own.
    """
    if len(survivors) < params.min_cohort:
        raise _refuse(
            "few", f"{len(survivors)} survivors, and a sum needs {params.min_cohort} or more"
        )
    threshold = params.reconstruction_threshold
    thin = graph.thin(survivors, survivors, threshold)
    if thin:
        raise _refuse(
            "thin", f"fewer than {threshold} survivors in the neighbourhood of {', '.join(thin)}"
        )
    if not graph.connected(survivors):
        raise _refuse("split", "the survivors fall into parts that no mask connects")


def _refuse(code: str, what: str) -> Refusal:
    return Refusal(
        f"secagg-survivors-{code}",
        f"The round cannot be unmasked: {what}.",
        "Start a new round, with longer deadlines if hospitals were only late.",
    )
