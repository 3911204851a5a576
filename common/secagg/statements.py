"""What hospitals say under their signature, and the hashes that tie it together.

An :class:`Advertisement` brings a hospital's fresh keys; the cohort hash covers all of them
and is the context of every later message. A :class:`ShareStatement` commits a hospital to
its seed and to each share, so that a wrong one can be traced to who sent it. The committed
values have full entropy, which is why a plain hash hides them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from common.secagg import wire
from common.secagg.binding import RoundBinding, transcript
from common.secagg.errors import Refusal
from common.secagg.keys import KEY_BYTES, SIGNATURE_BYTES, Identity, check_public, verify

HASH_BYTES = 32
SEED, MASK_KEY = "seed", "mask key"
ENTRY_BYTES = 512
"""More than one advertisement, one signature or one name needs on the wire."""


@dataclass(frozen=True)
class Advertisement:
    """A hospital's name, identity key and this round's channel and mask keys, signed."""

    name: str
    identity: bytes
    channel: bytes
    mask: bytes
    signature: bytes

    @classmethod
    def make(
        cls, name: str, identity: Identity, channel: bytes, mask: bytes, binding: RoundBinding
    ) -> Advertisement:
        """Sign ``channel`` and ``mask`` (public keys) for the round of ``binding``."""
        statement = _advertised(binding, name, identity.public, channel, mask)
        return cls(name, identity.public, channel, mask, identity.sign(statement))

    def check(self, binding: RoundBinding, roster: Mapping[str, bytes] | None) -> None:
        """Refuse an identity that is not the roster's, a signature that is not its own, or a key
        of low order (which would stop the round of every neighbour at a later stage)."""
        if roster is not None and roster.get(self.name) != self.identity:
            raise Refusal(
                "secagg-identity",
                f"Hospital {self.name!r} came with an identity key that is not on the roster.",
                "Ask the coordinator for a current roster; if it is current, the server "
                "or that hospital is not who it claims to be.",
            )
        statement = _advertised(binding, self.name, self.identity, self.channel, self.mask)
        if not verify(self.identity, self.signature, statement):
            raise bad_signature(self.name, "advertised keys")
        for public in (self.channel, self.mask):
            check_public(public)

    def fields(self) -> list[object]:
        """The fields as they go on the wire."""
        return [self.name, self.identity, self.channel, self.mask, self.signature]

    @classmethod
    def from_fields(cls, value: object) -> Advertisement:
        """Read :meth:`fields`; :class:`Refusal` if malformed."""
        name, identity, channel, mask, signature = wire.as_record(value, 5)
        return cls(
            wire.as_name(name),
            wire.as_bytes(identity, KEY_BYTES),
            wire.as_bytes(channel, KEY_BYTES),
            wire.as_bytes(mask, KEY_BYTES),
            wire.as_bytes(signature, SIGNATURE_BYTES),
        )


def check_distinct(cohort: Sequence[Advertisement]) -> None:
    """Refuse a name that stands twice in a cohort, or any key that is used twice."""
    names = [member.name for member in cohort]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise Refusal(
            "secagg-duplicate",
            f"Named twice in the cohort: {', '.join(twice)}.",
            "Each hospital takes part once; check the names that the nodes are registered with.",
        )
    keys = [key for m in cohort for key in (m.identity, m.channel, m.mask)]
    if len(set(keys)) != len(keys):
        raise Refusal(
            "secagg-keys",
            "A public key stands twice in the cohort.",
            "Each hospital makes its own keys; do not copy a hospital's state to another.",
        )


def cohort_hash(binding: RoundBinding, cohort: Sequence[Advertisement]) -> bytes:
    """32 bytes over the binding and every member's keys: the context of all later messages."""
    parts: list[bytes | str | int] = [binding.digest, len(cohort)]
    for member in cohort:
        parts += [member.name, member.identity, member.channel, member.mask]
    return transcript("cohort", *parts)


def commit(kind: str, context: bytes, owner: str, holder: str, value: bytes) -> bytes:
    """Hash commitment to one share, or (``holder`` empty) to the seed itself."""
    return transcript("commitment", kind, context, owner, holder, value)


@dataclass(frozen=True)
class ShareStatement:
    """``owner``'s commitments: the seed, and each holder's two shares, in holders' order."""

    owner: str
    seed: bytes
    seed_shares: tuple[bytes, ...]
    key_shares: tuple[bytes, ...]
    signature: bytes

    @classmethod
    def make(
        cls,
        owner: str,
        identity: Identity,
        context: bytes,
        seed: bytes,
        shares: Mapping[str, tuple[bytes, bytes]],
    ) -> ShareStatement:
        """Commit to ``seed`` and to each holder's (seed share, mask-key share), and sign."""
        seeds = tuple(commit(SEED, context, owner, h, shares[h][0]) for h in sorted(shares))
        keys = tuple(commit(MASK_KEY, context, owner, h, shares[h][1]) for h in sorted(shares))
        root = commit(SEED, context, owner, "", seed)
        signed = identity.sign(_shared(context, owner, root, seeds, keys))
        return cls(owner, root, seeds, keys, signed)

    def check(self, context: bytes, identity: bytes, holders: Sequence[str]) -> None:
        """Refuse a statement without a commitment for each holder, or not signed by its owner."""
        if not len(self.seed_shares) == len(self.key_shares) == len(holders):
            raise Refusal(
                "secagg-holders",
                f"Hospital {self.owner!r} did not share with exactly its neighbourhood.",
                "Start a new round without that hospital.",
            )
        statement = _shared(context, self.owner, self.seed, self.seed_shares, self.key_shares)
        if not verify(identity, self.signature, statement):
            raise bad_signature(self.owner, "commitments")

    def holds(
        self, kind: str, context: bytes, holders: Sequence[str], holder: str, share: bytes
    ) -> bool:
        """Whether ``share`` is the one of ``kind`` that the owner committed to for ``holder``."""
        column = self.seed_shares if kind == SEED else self.key_shares
        expected = column[list(holders).index(holder)]
        return commit(kind, context, self.owner, holder, share) == expected

    def digest(self, context: bytes) -> bytes:
        """32 bytes over the statement: associated data of the sealed shares."""
        return transcript(
            "sealed", _shared(context, self.owner, self.seed, self.seed_shares, self.key_shares)
        )

    def fields(self) -> list[object]:
        """The fields as they go on the wire."""
        return [
            self.owner,
            self.seed,
            list(self.seed_shares),
            list(self.key_shares),
            self.signature,
        ]

    @classmethod
    def from_fields(cls, value: object, most: int) -> ShareStatement:
        """Read :meth:`fields`, at most ``most`` holders; :class:`Refusal` if malformed."""
        owner, seed, seeds, keys, signature = wire.as_record(value, 5)
        return cls(
            wire.as_name(owner),
            wire.as_bytes(seed, HASH_BYTES),
            tuple(wire.as_bytes(entry, HASH_BYTES) for entry in wire.as_list(seeds, most=most)),
            tuple(wire.as_bytes(entry, HASH_BYTES) for entry in wire.as_list(keys, most=most)),
            wire.as_bytes(signature, SIGNATURE_BYTES),
        )


def survivors_statement(context: bytes, survivors: Sequence[str]) -> bytes:
    """What a hospital signs in the consistency stage; ``survivors`` sorted."""
    return transcript("survivors", context, len(survivors), *survivors)


def read_names(value: object, most: int) -> list[str]:
    """A list of names in strictly rising order, so that each stands once."""
    names = [wire.as_name(entry) for entry in wire.as_list(value, most=most)]
    if any(first >= second for first, second in pairwise(names)):
        raise Refusal(
            "secagg-duplicate",
            "A list of hospitals is not sorted, or names one twice.",
            "Start a new round; if it comes again, treat the server as hostile.",
        )
    return names


def bad_signature(name: str, what: str) -> Refusal:
    """The refusal for a signature that is missing, forged, or of another round."""
    return Refusal(
        "secagg-signature",
        f"The {what} of hospital {name!r} are not signed by it for this round.",
        "Start a new round; if it comes again, treat the server as hostile.",
    )


def _advertised(
    binding: RoundBinding, name: str, identity: bytes, channel: bytes, mask: bytes
) -> bytes:
    return transcript("advertise", binding.digest, name, identity, channel, mask)


def _shared(
    context: bytes, owner: str, seed: bytes, seeds: Sequence[bytes], keys: Sequence[bytes]
) -> bytes:
    return transcript("share", context, owner, seed, len(seeds), *seeds, len(keys), *keys)
