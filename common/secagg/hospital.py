"""A hospital's side of a round: five stages, in order, each once, then nothing is left.

SecAgg+ of Bell et al. (CCS 2020) with the active-adversary stages of Bonawitz et al. (CCS
2017), section 4 and figure 4. The hospital trusts nothing that the server says: each method
checks first and answers afterwards. An error of any kind wipes the machine before it leaves
it; what was refused cannot be asked again.

What the transport must do: store :meth:`HospitalRound.to_bytes` *before* it sends an answer,
so that no crash lets a stage run twice, and keep those bytes on the hospital's own node.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from common.secagg import messages
from common.secagg.binding import RoundBinding
from common.secagg.encoding import pack, ring_dtype
from common.secagg.errors import Refusal, hostile
from common.secagg.graph import CohortGraph, check_survivors
from common.secagg.keys import (
    Entropy,
    Identity,
    new_secret,
    pair_mask_key,
    public_key,
    self_mask_key,
    verify,
)
from common.secagg.masks import RingArray, add_mask
from common.secagg.params import SecAggPolicy
from common.secagg.sharing import Channel, open_shares, seal_shares, split_secrets
from common.secagg.state import HospitalState
from common.secagg.statements import (
    MASK_KEY,
    SEED,
    Advertisement,
    bad_signature,
    check_distinct,
    cohort_hash,
    survivors_statement,
)
from common.secagg.trust import check_members

_T = TypeVar("_T")


class HospitalRound:
    """One hospital in one round. Made by :meth:`advertise` or :meth:`from_bytes`."""

    def __init__(self, state: HospitalState) -> None:
        """Use :meth:`advertise` or :meth:`from_bytes` instead."""
        self._state = state

    @property
    def stage(self) -> str:
        """The last stage completed: advertised, shared, masked, signed, done; or dead."""
        return self._state.stage

    @property
    def name(self) -> str:
        """The hospital's name in the round."""
        return self._state.name

    @property
    def survivors(self) -> list[str]:
        """Whose vectors the sum holds: the list that it signed; empty before it signed one."""
        return list(self._state.survivors)

    @property
    def authenticated(self) -> bool:
        """Whether the cohort's identities were checked against a roster.

        False until the share stage, and in a round without a roster: then the server could
        stand in the middle, and the promise holds only against one that does not.
        """
        return self._state.authenticated

    def __repr__(self) -> str:
        """Name and stage; no secret."""
        return f"HospitalRound(name={self.name!r}, stage={self.stage!r})"

    def wipe(self) -> None:
        """Abort: drop every secret. The machine is dead afterwards."""
        self._state.wipe("dead")

    def to_bytes(self) -> bytes:
        """The state for the next process; holds secrets until the round is over."""
        return self._state.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> HospitalRound:
        """Continue from :meth:`to_bytes`; :class:`Refusal` if the bytes are malformed."""
        return cls(HospitalState.from_bytes(data))

    # Stage 1 ---------------------------------------------------------------------------

    @classmethod
    def advertise(
        cls,
        name: str,
        binding: RoundBinding,
        *,
        identity: Identity,
        policy: SecAggPolicy,
        model_hash: bytes,
        entropy: Entropy = os.urandom,
    ) -> tuple[HospitalRound, bytes]:
        """Accept the round's terms, and make and sign this round's public keys.

        model_hash: the hospital's own hash of the model that it received; it must be the
            binding's. Refuses (``secagg-policy``, ``secagg-parameters``, ``secagg-model``).
        """
        policy.check(binding.params, binding.layout)
        binding.validate()
        if model_hash != binding.model_hash:
            raise Refusal(
                "secagg-model",
                "The model that this hospital received is not the one that the round names.",
                "Start a new round; if it comes again, treat the server as hostile.",
            )
        channel, mask = new_secret(entropy), new_secret(entropy)
        own = Advertisement.make(name, identity, public_key(channel), public_key(mask), binding)
        message = messages.build_advertisement(binding, own)
        # Read back: a name that no reader accepts is refused here, not by everybody else.
        messages.read_advertisement(binding, message)
        state = HospitalState("advertised", name, binding, own)
        state.channel_private, state.mask_private = channel, mask
        return cls(state), message

    # Stage 2 ---------------------------------------------------------------------------

    def share(
        self,
        message: bytes,
        *,
        identity: Identity,
        policy: SecAggPolicy,
        roster: Mapping[str, bytes] | None = None,
        accepted: Collection[bytes] = (),
        entropy: Entropy = os.urandom,
    ) -> bytes:
        """Check the cohort, then share this hospital's secrets with its neighbourhood.

        message: the server's cohort. roster: identity keys by name; without it the keys in
        the advertisements are believed and :attr:`authenticated` stays False. accepted: the
        identity keys that this hospital's people have accepted (its own need not be there).
        Refuses a cohort that is too small, has a name or key twice, altered this hospital's entry
        (``secagg-own-entry``), holds an identity or signature that is not right, or, with a
        roster, members that the policy does not let in (``secagg-members``).
        """
        with self._stage("advertised", "shared") as state:
            binding, own = _known(state.binding), _known(state.own)
            if roster is None and policy.require_roster:
                raise Refusal(
                    "secagg-roster",
                    "This hospital's policy asks for a signed roster, and there is none.",
                    "Ask the coordinator for the roster, and name it in the node's settings.",
                )
            cohort = messages.read_cohort(binding, message)
            policy.check(binding.params, binding.layout, len(cohort))
            check_distinct(cohort)
            if own not in cohort or identity.public != own.identity:
                raise Refusal(
                    "secagg-own-entry",
                    "This hospital's own entry in the cohort is missing or altered.",
                    "Start a new round; if it comes again, treat the server as hostile.",
                )
            for member in cohort:
                member.check(binding, roster)
            state.cohort = sorted(cohort, key=lambda member: member.name)
            state.authenticated = roster is not None
            self._check_members([member.name for member in cohort], accepted, policy)
            state.seed = new_secret(entropy)
            return self._shares(identity, entropy)

    def _check_members(
        self, present: Collection[str], accepted: Collection[bytes], policy: SecAggPolicy
    ) -> None:
        if not self._state.authenticated:
            return  # without a roster nobody's key says who somebody is
        keys = set(accepted)
        trusted = [member.name for member in self._state.cohort if member.identity in keys]
        params = _known(self._state.binding).params
        check_members(self.name, self._graph(), present, trusted, params, policy)

    def _shares(self, identity: Identity, entropy: Entropy) -> bytes:
        state, channel = self._state, self._channel()
        holders = self._graph().of(state.name)
        threshold = _known(state.binding).params.reconstruction_threshold
        _enough(len(holders), threshold, "are in this hospital's neighbourhood")
        shares = split_secrets(state.seed, state.mask_private, threshold, holders)
        publics = {member.name: member.channel for member in state.cohort}
        statement, sealed = seal_shares(channel, identity, state.seed, shares, publics, entropy)
        state.held = {state.name: shares[state.name]}
        return messages.build_shares(channel.context, statement, sealed)

    # Stage 3 ---------------------------------------------------------------------------

    def masked_input(self, message: bytes, vector: RingArray) -> bytes:
        """Open the neighbours' shares, then mask ``vector`` in place and pack it.

        message: what the server relayed. vector: ring elements of the layout's length
        (uint32, or uint64 above 32 bits), overwritten. A share that does not open, or that
        its owner did not commit to, stops the round and names the owner
        (``secagg-sealed``, ``secagg-commitment``): leaving that neighbour out instead would
        let the server choose, by tampering, with whom this hospital shares masks.
        """
        with self._stage("shared", "masked") as state:
            params = _known(state.binding).params
            self._check_vector(vector)
            channel, graph, members = self._channel(), self._graph(), self._members()
            context = channel.context
            recipient, entries = messages.read_relay(context, params, message)
            neighbours = set(graph.of(state.name)) - {state.name}
            owners = [statement.owner for statement, _ in entries]
            if recipient != state.name or len(set(owners)) != len(owners):
                raise hostile("relay", "Relayed shares are another hospital's, or come twice")
            if not set(owners) <= neighbours:
                raise hostile("neighbours", "Relayed shares of a hospital that is no neighbour")
            _enough(
                len(owners) + 1,
                params.reconstruction_threshold,
                "of this hospital's neighbourhood shared their keys",
            )
            for statement, sealed in entries:
                owner = statement.owner
                state.held[owner] = open_shares(
                    channel, statement, sealed, members[owner], graph.of(owner)
                )
            add_mask(vector, self_mask_key(state.seed, state.name, context), 1)
            for owner in owners:
                key = pair_mask_key(
                    state.mask_private, state.name, members[owner].mask, owner, context
                )
                add_mask(vector, key, 1 if state.name < owner else -1)
            # From here on only the shares of others are needed.
            state.channel_private = state.mask_private = state.seed = b""
            return messages.build_masked(context, state.name, pack(vector, params.ring_bits))

    def _check_vector(self, vector: RingArray) -> None:
        binding = _known(self._state.binding)
        if (
            vector.shape != (binding.layout.length,)
            or vector.dtype != ring_dtype(binding.params.ring_bits)
            or not vector.flags.writeable
            or not vector.flags.c_contiguous
        ):
            raise Refusal(
                "secagg-values",
                "The vector to be masked does not have the layout's length and type.",
                "Encode it with the round's own layout and parameters.",
            )

    # Stage 4 ---------------------------------------------------------------------------

    def consistency(
        self,
        message: bytes,
        *,
        identity: Identity,
        policy: SecAggPolicy,
        accepted: Collection[bytes] = (),
    ) -> bytes:
        """Sign the server's set of survivors, if unmasking it would protect each of them.

        Refuses a set without this hospital (``secagg-not-survivor``), with a stranger or a
        neighbour that did not share with it (``secagg-not-cohort``), one that
        :func:`~common.secagg.graph.check_survivors` refuses, or one in which too few are left that
        its people have accepted (``secagg-members``; ``accepted``: as they are now, so that whoever
        was revoked since the cohort was shown stops the round).
        """
        with self._stage("masked", "signed") as state:
            context, graph = self._context(), self._graph()
            params = _known(state.binding).params
            survivors = messages.read_survivors(context, params, message)
            if state.name not in survivors:
                raise hostile("not-survivor", "This hospital is missing among the survivors")
            near = set(graph.of(state.name)) & set(survivors)
            if not set(survivors) <= set(self._members()) or not near <= set(state.held):
                raise hostile("not-cohort", "A survivor is not in the cohort, or did not share")
            check_survivors(graph, survivors, params)
            self._check_members(survivors, accepted, policy)
            if identity.public != _known(state.own).identity:
                raise hostile("own-entry", "This hospital's identity changed within the round")
            state.survivors = survivors
            signature = identity.sign(survivors_statement(context, survivors))
            return messages.build_signature(context, state.name, signature)

    # Stage 5 ---------------------------------------------------------------------------

    def unmask(self, message: bytes) -> bytes:
        """Reveal one share for each neighbour, once, and wipe everything.

        message: signatures over the survivors. At least ``t`` of this hospital's
        neighbourhood, itself included, must have signed the very set that it signed
        (``secagg-signature``, ``secagg-signers-few``). Then: of the seed for a survivor, of
        the mask key for one that shared and dropped; never both.
        """
        with self._stage("signed", "done") as state:
            context, members = self._context(), self._members()
            near = self._graph().of(state.name)
            params = _known(state.binding).params
            statement = survivors_statement(context, state.survivors)
            signatures = messages.read_signatures(context, params, message)
            if not set(signatures) <= set(state.survivors):
                raise hostile("not-survivor", "A signature of a hospital that did not survive")
            signers = {name for name in near if name in signatures} | {state.name}
            for name in sorted(signers - {state.name}):
                if not verify(members[name].identity, signatures[name], statement):
                    raise bad_signature(name, "survivors")
            if len(signers) < params.reconstruction_threshold:
                raise Refusal(
                    "secagg-signers-few",
                    f"Only {len(signers)} of this hospital's neighbourhood signed the same "
                    f"survivors; {params.reconstruction_threshold} are needed.",
                    "Start a new round; nothing was revealed.",
                )
            alive = set(state.survivors)
            shares = [
                (owner, SEED, pair[0]) if owner in alive else (owner, MASK_KEY, pair[1])
                for owner, pair in state.held.items()
            ]
            answer = messages.build_revealed(context, state.name, shares)
            state.wipe("done")
            return answer

    # -----------------------------------------------------------------------------------

    @contextmanager
    def _stage(self, before: str, after: str) -> Iterator[HospitalState]:
        """Run one stage: only after ``before``; wiped and dead if anything is raised."""
        try:
            if self._state.stage != before:
                raise Refusal(
                    "secagg-stage",
                    f"A stage that follows {before!r} was asked for after {self._state.stage!r}.",
                    "The stages come in one order, each once; start a new round.",
                )
            yield self._state
        except BaseException:
            self.wipe()
            raise
        self._state.stage = after

    def _context(self) -> bytes:
        return cohort_hash(_known(self._state.binding), self._state.cohort)

    def _graph(self) -> CohortGraph:
        binding = _known(self._state.binding)
        names = [member.name for member in self._state.cohort]
        return CohortGraph.build(names, self._context(), binding.params)

    def _channel(self) -> Channel:
        return Channel(self._state.name, self._state.channel_private, self._context())

    def _members(self) -> dict[str, Advertisement]:
        return {member.name: member for member in self._state.cohort}


def _known(value: _T | None) -> _T:
    if value is None:
        raise Refusal("secagg-stage", "The round is over.", "Start a new round.")
    return value


def _enough(count: int, threshold: int, what: str) -> None:
    if count < threshold:
        raise Refusal(
            "secagg-neighbours-few",
            f"Only {count} {what}; {threshold} are needed.",
            "Start a new round when more hospitals are online.",
        )
