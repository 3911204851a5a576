"""Splitting a hospital's two secrets among its neighbours, and opening what they sent.

Bonawitz et al. (CCS 2017), figure 4, round 1, with the owner's commitments added: each share
is checked when it arrives, and again by the server when it is revealed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from common.secagg import shamir
from common.secagg.binding import canonical
from common.secagg.errors import Refusal, hostile
from common.secagg.keys import Entropy, Identity, agree, open_sealed, seal
from common.secagg.messages import SALT_BYTES, Sealed
from common.secagg.statements import MASK_KEY, SEED, Advertisement, ShareStatement


@dataclass(frozen=True)
class Channel:
    """One hospital's end of the sealed channels of a round: its name, key and cohort hash."""

    name: str
    private: bytes = field(repr=False)
    context: bytes

    def key(self, public: bytes, salt: bytes, owner: str, holder: str) -> bytes:
        """The key of the one message from ``owner`` to ``holder``."""
        return agree(self.private, public, salt, "channel", self.context, owner, holder)

    def associated(self, statement: ShareStatement, holder: str) -> bytes:
        """What the sealed message is bound to: its round, its ends and its commitments."""
        digest = statement.digest(self.context)
        return canonical("sealed shares", self.context, statement.owner, holder, digest)


def split_secrets(
    seed: bytes, mask_private: bytes, threshold: int, holders: Sequence[str]
) -> dict[str, tuple[bytes, bytes]]:
    """For each holder its (seed share, mask-key share); ``holders`` in the order of indices."""
    seeds = shamir.split(seed, threshold, len(holders))
    keys = shamir.split(mask_private, threshold, len(holders))
    return dict(zip(holders, zip(seeds, keys, strict=True), strict=True))


def seal_shares(
    channel: Channel,
    identity: Identity,
    seed: bytes,
    shares: dict[str, tuple[bytes, bytes]],
    publics: dict[str, bytes],
    entropy: Entropy,
) -> tuple[ShareStatement, list[Sealed]]:
    """Commit to all shares, and seal each holder's pair; the owner's own is not sent.

    publics: the channel key of each holder.
    """
    statement = ShareStatement.make(channel.name, identity, channel.context, seed, shares)
    sealed = []
    for holder in sorted(shares.keys() - {channel.name}):
        salt = entropy(SALT_BYTES)
        key = channel.key(publics[holder], salt, channel.name, holder)
        associated = channel.associated(statement, holder)
        sealed.append(Sealed(holder, salt, seal(key, b"".join(shares[holder]), associated)))
    return statement, sealed


def open_shares(
    channel: Channel,
    statement: ShareStatement,
    sealed: Sealed,
    owner: Advertisement,
    holders: Sequence[str],
) -> tuple[bytes, bytes]:
    """The (seed share, mask-key share) that ``owner`` sent to this hospital.

    Refuses a statement that its owner did not sign (``secagg-signature``), a box that was
    altered (``secagg-sealed``), and a share that the owner did not commit to, naming it
    (``secagg-commitment``).
    """
    statement.check(channel.context, owner.identity, holders)
    key = channel.key(owner.channel, sealed.salt, owner.name, channel.name)
    plain = open_sealed(key, sealed.box, channel.associated(statement, channel.name))
    if sealed.holder != channel.name or plain is None:
        raise hostile("sealed", f"The sealed shares of hospital {owner.name!r} were altered")
    pair = plain[: shamir.SHARE_BYTES], plain[shamir.SHARE_BYTES :]
    for kind, share in zip((SEED, MASK_KEY), pair, strict=True):
        if not statement.holds(kind, channel.context, holders, channel.name, share):
            raise Refusal(
                "secagg-commitment",
                f"Hospital {owner.name!r} sent a share that it did not commit to.",
                f"Start a new round, and ask hospital {owner.name!r} to check its installation.",
            )
    return pair
