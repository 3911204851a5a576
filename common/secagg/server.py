"""The server's side of a round: collect, relay, add up, unmask. It holds no hospital's vector.

Each stage is ``collect_*`` once per answer, then ``close_*`` once, which returns what to send
next. A hospital that is silent at ``close_*`` has dropped; one whose message is refused has
dropped at that stage, alone, with the reason. Below the threshold ``close_*`` or ``finish``
raises :class:`RoundError` with names, and the sum is thrown away. There is no clock here:
the transport's deadlines decide when to close.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from common.errors import ProtocolError, RoundError
from common.secagg import messages
from common.secagg.binding import RoundBinding
from common.secagg.encoding import unpack, zeros
from common.secagg.errors import Refusal
from common.secagg.graph import CohortGraph, check_survivors
from common.secagg.keys import verify
from common.secagg.masks import RingArray
from common.secagg.outcome import Dropout, RoundOutcome
from common.secagg.statements import (
    MASK_KEY,
    SEED,
    Advertisement,
    ShareStatement,
    bad_signature,
    check_distinct,
    cohort_hash,
    survivors_statement,
)
from common.secagg.unmasking import Unmasking


class ServerRound:
    """The server in one round. Stages: advertise, share, masked, consistency, unmask."""

    def __init__(
        self,
        binding: RoundBinding,
        expected: Iterable[str],
        *,
        roster: Mapping[str, bytes] | None = None,
    ) -> None:
        """expected: the hospitals asked; roster: their identity keys, if there is a roster.

        Raises :class:`~common.errors.ConfigError` if the parameters or the layout cannot
        work, before anything starts.
        """
        binding.validate()
        self.binding = binding
        self._roster = roster
        self._expected = tuple(sorted(set(expected)))
        self._stage = "advertise"
        self._dropped: dict[str, Dropout] = {}
        self._misbehaved: dict[str, str] = {}
        self._members: dict[str, Advertisement] = {}
        self._context = b""
        self._graph = CohortGraph({})
        self._statements: dict[str, ShareStatement] = {}
        self._sealed: dict[str, dict[str, messages.Sealed]] = {}
        self._total: RingArray | None = None
        self._survivors: list[str] = []
        self._signatures: dict[str, bytes] = {}
        self._answered: set[str] = set()
        self._revealed: dict[str, dict[str, bytes]] = {}

    @property
    def stage(self) -> str:
        """The stage being collected; ``done`` or ``failed`` at the end."""
        return self._stage

    @property
    def outcome(self) -> RoundOutcome:
        """Who was expected, contributed and dropped; complete once the round has ended."""
        contributed = () if self._stage == "failed" else tuple(self._survivors)
        return RoundOutcome(
            self._expected, contributed, dict(self._dropped), dict(self._misbehaved)
        )

    @property
    def pending(self) -> tuple[str, ...]:
        """Hospitals whose answer in the present stage has not come yet."""
        return tuple(sorted(set(self._asked()) - self._answered - set(self._dropped)))

    def drop(self, name: str, reason: str) -> None:
        """The transport lost ``name`` or got its error code; it is out from this stage on."""
        if name in self.pending:
            self._dropped[name] = Dropout(self._stage, reason)

    # Stage 1 ---------------------------------------------------------------------------

    def collect_advertisement(self, name: str, message: bytes) -> bool:
        """Take a hospital's keys; False if refused (it has dropped) or not awaited."""

        def take() -> None:
            member = messages.read_advertisement(self.binding, message)
            _same(member.name, name)
            member.check(self.binding, self._roster)
            check_distinct([*self._members.values(), member])
            self._members[name] = member

        return self._collect("advertise", name, take)

    def close_advertise(self) -> bytes:
        """The cohort, to be sent to every hospital that advertised."""
        with self._closing("advertise", "share"):
            params = self.binding.params
            self._at_least(params.min_cohort, self._members, "advertised their keys")
            if len(self._members) > params.max_cohort:
                raise RoundError(
                    f"{len(self._members)} hospitals advertised, more than {params.max_cohort}.",
                    "Invite fewer, or raise max_cohort; the model is unchanged.",
                )
            cohort = [self._members[name] for name in sorted(self._members)]
            self._context = cohort_hash(self.binding, cohort)
            self._graph = CohortGraph.build(sorted(self._members), self._context, params)
            return messages.build_cohort(self.binding, cohort)

    # Stage 2 ---------------------------------------------------------------------------

    def collect_shares(self, name: str, message: bytes) -> bool:
        """Take a hospital's commitments and sealed shares; False if refused or not awaited."""

        def take() -> None:
            statement, sealed = messages.read_shares(self._context, self.binding.params, message)
            _same(statement.owner, name)
            holders = self._graph.of(name)
            statement.check(self._context, self._members[name].identity, holders)
            boxes = {entry.holder: entry for entry in sealed}
            if len(boxes) != len(sealed) or set(boxes) != set(holders) - {name}:
                raise Refusal(
                    "secagg-holders", "Sealed shares for others than the neighbourhood.", "-"
                )
            self._statements[name], self._sealed[name] = statement, boxes

        return self._collect("share", name, take)

    def close_shares(self) -> dict[str, bytes]:
        """For each hospital that shared, the sealed shares of its neighbours who did."""
        with self._closing("share", "masked"):
            params = self.binding.params
            self._at_least(params.min_cohort, self._statements, "shared their keys")
            self._dense(self._statements, self._statements, "shared their keys")
            relays = {
                name: messages.build_relay(
                    self._context,
                    name,
                    [
                        (self._statements[owner], self._sealed[owner][name])
                        for owner in self._graph.of(name)
                        if owner != name and owner in self._statements
                    ],
                )
                for name in self._statements
            }
            self._sealed = {}
            self._total = zeros(self.binding.layout, params)
            return relays

    # Stage 3 ---------------------------------------------------------------------------

    def collect_masked(self, name: str, message: bytes) -> bool:
        """Add a hospital's masked input to the sum; the message is not kept."""
        bits, length = self.binding.params.ring_bits, self.binding.layout.length

        def take() -> None:
            size = length * bits // 8
            sender, packed = messages.read_masked(self._context, message, size)
            _same(sender, name)
            vector = unpack(packed, length, bits)
            np.add(_known(self._total), vector, out=_known(self._total))
            self._survivors.append(name)

        return self._collect("masked", name, take)

    def close_masked(self) -> bytes:
        """The survivors, to be sent to each of them."""
        with self._closing("masked", "consistency"):
            self._survivors.sort()
            check_survivors(self._graph, self._survivors, self.binding.params)
            self._dense(self._statements, self._survivors, "delivered their masked input")
            return messages.build_survivors(self._context, self._survivors)

    # Stage 4 ---------------------------------------------------------------------------

    def collect_consistency(self, name: str, message: bytes) -> bool:
        """Take a survivor's signature over the survivors; False if refused or not awaited."""

        def take() -> None:
            sender, signature = messages.read_signature(self._context, message)
            _same(sender, name)
            statement = survivors_statement(self._context, self._survivors)
            if not verify(self._members[name].identity, signature, statement):
                raise bad_signature(name, "survivors")
            self._signatures[name] = signature

        return self._collect("consistency", name, take)

    def close_consistency(self) -> bytes:
        """All signatures, to be sent to each hospital that signed."""
        with self._closing("consistency", "unmask"):
            self._dense(self._statements, self._signatures, "signed the survivors")
            return messages.build_signatures(self._context, list(self._signatures.items()))

    # Stage 5 ---------------------------------------------------------------------------

    def collect_unmask(self, name: str, message: bytes) -> bool:
        """Take the shares that a hospital reveals; a wrong one is discarded and named.

        True if the message was in order, even if a share in it was not (see
        ``outcome.misbehaved``); its other shares are proven right by their commitments.
        """
        facts = self._facts()

        def take() -> None:
            sender, shares = messages.read_revealed(self._context, self.binding.params, message)
            _same(sender, name)
            alive = set(self._survivors)
            asked = {o: SEED if o in alive else MASK_KEY for o in facts.expected(name)}
            if {owner: kind for owner, (kind, _) in shares.items()} != asked:
                raise Refusal("secagg-revealed", "Other shares than were asked for.", "-")
            for owner, (kind, share) in shares.items():
                holders, statement = self._graph.of(owner), self._statements[owner]
                if statement.holds(kind, self._context, holders, name, share):
                    self._revealed.setdefault(owner, {})[name] = share
                else:
                    self._misbehaved[name] = f"wrong share of hospital {owner!r}"

        return self._collect("unmask", name, take)

    def finish(self) -> RingArray:
        """The sum over the survivors, as ring elements, for :func:`~.encoding.decode`.

        Raises :class:`RoundError` if too few right shares came back. Can be called as soon as
        enough hospitals answered; those still pending are then recorded as dropped.
        """
        with self._closing("unmask", "done"):
            total = _known(self._total)
            self._facts().unmask(total, self._revealed)
            self._revealed, self._total = {}, None
            return total

    # -----------------------------------------------------------------------------------

    def _facts(self) -> Unmasking:
        threshold = self.binding.params.reconstruction_threshold
        return Unmasking(
            self._context, self._graph, threshold, self._members, self._statements, self._survivors
        )

    def _asked(self) -> Iterable[str]:
        return {
            "advertise": self._expected,
            "share": self._members,
            "masked": self._statements,
            "consistency": self._survivors,
            "unmask": self._signatures,
        }.get(self._stage, ())

    def _collect(self, stage: str, name: str, take: Callable[[], None]) -> bool:
        """Run ``take`` for an awaited answer; what it refuses drops this hospital only."""
        if self._stage != stage or name not in self.pending:
            return False
        try:
            take()
        except ProtocolError as error:
            self._dropped[name] = Dropout(stage, f"refused: {error.code}")
            return False
        self._answered.add(name)
        return True

    @contextmanager
    def _closing(self, stage: str, following: str) -> Iterator[None]:
        """Close ``stage``: the silent have dropped; any error ends the round for good."""
        if self._stage != stage:
            raise ProtocolError(
                f"Stage {stage!r} was closed while the round is at {self._stage!r}.",
                "Close each stage once, in order; start a new round after a failure.",
            )
        for name in self.pending:
            self._dropped[name] = Dropout(stage, "no answer before the deadline")
        try:
            yield
        except BaseException as error:
            self._stage = "failed"
            self._total, self._revealed, self._sealed = None, {}, {}
            if isinstance(error, Refusal | RoundError):
                raise self._named(error) from None
            raise
        self._stage, self._answered = following, set()

    def _at_least(self, least: int, present: Collection[str], what: str) -> None:
        if len(present) < least:
            raise RoundError(
                f"Only {len(present)} of {len(self._expected)} hospitals {what}, and {least} are "
                "needed.",
                "Start a new round when more are online, or give them more time; the model is "
                "unchanged.",
            )

    def _dense(self, owners: Collection[str], present: Collection[str], what: str) -> None:
        """Fail unless, around each of ``owners``, ``t`` of the ``present`` can reveal shares."""
        threshold = self.binding.params.reconstruction_threshold
        thin = self._graph.thin(owners, present, threshold)
        if thin:
            raise RoundError(
                f"Fewer than {threshold} hospitals {what} around {', '.join(thin)}.",
                "Start a new round, with longer deadlines if hospitals were only late; the model "
                "is unchanged.",
            )

    def _named(self, error: Refusal | RoundError) -> RoundError:
        """``error`` as the round's own, with everybody who dropped."""
        gone = "; ".join(
            f"{name} at {drop.stage} ({drop.reason})"
            for name, drop in sorted(self._dropped.items())
        )
        return RoundError(f"{error.what} Dropped: {gone or 'nobody'}.", error.remedy)


def _same(claimed: str, name: str) -> None:
    if claimed != name:
        raise Refusal("secagg-sender", "A message names another hospital than it came from.", "-")


def _known(total: RingArray | None) -> RingArray:
    if total is None:
        raise ProtocolError("The round has no sum.", "Start a new round.")
    return total
