"""A hospital's state between two stages, as bytes.

Flower starts a new process for each message, so the state machine is written out after each
stage and read back before the next. The bytes hold secrets: they may lie in Flower's
``Context.state``, which stays on the hospital's node, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from common.secagg import wire
from common.secagg.binding import INVITATION_BYTES, RoundBinding
from common.secagg.errors import malformed
from common.secagg.keys import KEY_BYTES
from common.secagg.shamir import SHARE_BYTES
from common.secagg.statements import ENTRY_BYTES, Advertisement

STAGES = ("advertised", "shared", "masked", "signed", "done", "dead")
"""In order; each is entered once. ``dead`` may follow any of them, and nothing follows it."""


@dataclass
class HospitalState:
    """Everything that a hospital keeps of a round; what is secret is not in its repr.

    held: per owner, the shares of its seed and of its mask key that this hospital keeps.
    survivors: the set that it signed.
    """

    stage: str
    name: str
    binding: RoundBinding | None
    own: Advertisement | None
    authenticated: bool = False
    cohort: list[Advertisement] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)
    channel_private: bytes = field(default=b"", repr=False)
    mask_private: bytes = field(default=b"", repr=False)
    seed: bytes = field(default=b"", repr=False)
    held: dict[str, tuple[bytes, bytes]] = field(default_factory=dict, repr=False)

    def wipe(self, stage: str) -> None:
        """Drop every secret and enter ``stage``.

        Python cannot promise that freed memory is overwritten; the references are gone,
        and :meth:`to_bytes` has nothing left to write.
        """
        self.channel_private = self.mask_private = self.seed = b""
        self.held = {}
        self.cohort, self.survivors = [], []
        self.binding = self.own = None
        self.stage = stage

    def to_bytes(self) -> bytes:
        """The state, with its secrets while there are any."""
        return wire.pack(
            "state",
            b"",
            self.stage,
            self.name,
            self.binding.to_bytes() if self.binding else b"",
            self.own.fields() if self.own else [],
            int(self.authenticated),
            [member.fields() for member in self.cohort],
            self.survivors,
            [self.channel_private, self.mask_private, self.seed],
            [[owner, *self.held[owner]] for owner in sorted(self.held)],
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> HospitalState:
        """Read :meth:`to_bytes`; :class:`~common.secagg.errors.Refusal` if malformed."""
        limit = INVITATION_BYTES + ENTRY_BYTES * 10_000
        fields = wire.unpack(data, "state", None, fields=9, limit=limit)
        stage, name, binding, own, authenticated, cohort, survivors, secrets, held = fields
        if stage not in STAGES or not isinstance(binding, bytes):
            raise malformed("a stored state is of no known stage")
        channel, mask, seed = wire.as_record(secrets, 3)
        rows = [wire.as_record(row, 3) for row in wire.as_list(held)]
        return cls(
            stage=wire.as_text(stage),
            name=wire.as_name(name),
            binding=RoundBinding.from_bytes(binding) if binding else None,
            own=Advertisement.from_fields(own) if own else None,
            authenticated=wire.as_int(authenticated) == 1,
            cohort=[Advertisement.from_fields(entry) for entry in wire.as_list(cohort)],
            survivors=[wire.as_name(entry) for entry in wire.as_list(survivors)],
            channel_private=_secret(channel),
            mask_private=_secret(mask),
            seed=_secret(seed),
            held={
                wire.as_name(owner): (
                    wire.as_bytes(seed_share, SHARE_BYTES),
                    wire.as_bytes(key_share, SHARE_BYTES),
                )
                for owner, seed_share, key_share in rows
            },
        )


def _secret(value: object) -> bytes:
    return b"" if value == b"" else wire.as_bytes(value, KEY_BYTES)
