"""The server's last step: reconstruct the survivors' seeds and the lost mask keys, subtract.

Bonawitz et al. (CCS 2017), figure 4, round 4. Every share was checked against its owner's
commitment when it came; what is reconstructed is checked against the owner's seed
commitment or public key, so that an owner who shared nonsense is named.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from common.errors import RoundError
from common.secagg import shamir
from common.secagg.graph import CohortGraph
from common.secagg.keys import pair_mask_key, public_key, self_mask_key
from common.secagg.masks import RingArray, add_mask
from common.secagg.statements import SEED, Advertisement, ShareStatement, commit


@dataclass(frozen=True)
class Unmasking:
    """The public facts of a round that unmasking needs."""

    context: bytes
    graph: CohortGraph
    threshold: int
    members: Mapping[str, Advertisement]
    statements: Mapping[str, ShareStatement]
    survivors: Collection[str]

    def lost(self) -> list[str]:
        """Those who shared and then dropped: their masks are still in the sum."""
        return sorted(set(self.statements) - set(self.survivors))

    def expected(self, holder: str) -> set[str]:
        """The owners of whom ``holder`` reveals a share: its neighbours who shared."""
        return set(self.graph.of(holder)) & set(self.statements)

    def reconstruct(self, owner: str, shares: Mapping[str, bytes]) -> bytes:
        """``owner``'s seed, or mask key if it is lost, from the shares by holder.

        Raises :class:`RoundError` if they are too few, or ``owner`` shared something else
        than it committed to.
        """
        if len(shares) < self.threshold:
            raise RoundError(
                f"Only {len(shares)} of {self.threshold} shares of hospital {owner!r} came back, "
                f"from {_listed(shares)}.",
                "Start a new round; the model is unchanged.",
            )
        indexed = {self.graph.index(owner, holder): share for holder, share in shares.items()}
        secret = shamir.reconstruct(indexed, self.threshold)
        if owner in self.survivors:
            good = commit(SEED, self.context, owner, "", secret) == self.statements[owner].seed
        else:
            good = public_key(secret) == self.members[owner].mask
        if not good:
            raise RoundError(
                f"Hospital {owner!r} shared another secret than it committed to.",
                f"Start a new round without hospital {owner!r}; the model is unchanged.",
            )
        return secret

    def unmask(self, total: RingArray, revealed: Mapping[str, Mapping[str, bytes]]) -> None:
        """Subtract, in place, every mask that is left in ``total``.

        revealed: by owner, then by holder, the checked shares.
        """
        for owner in sorted(self.survivors):
            seed = self.reconstruct(owner, revealed.get(owner, {}))
            add_mask(total, self_mask_key(seed, owner, self.context), -1)
        for owner in self.lost():
            private = self.reconstruct(owner, revealed.get(owner, {}))
            for other in sorted(set(self.graph.of(owner)) & set(self.survivors)):
                key = pair_mask_key(private, owner, self.members[other].mask, other, self.context)
                # ``other`` added its side of the mask; the lost one's would have cancelled it.
                add_mask(total, key, -1 if other < owner else 1)


def _listed(names: Collection[str] | Sequence[str]) -> str:
    return ", ".join(sorted(names)) or "nobody"
