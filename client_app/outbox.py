"""The outbox: a hospital's task vectors on its disk, signed, until they are delivered and after.

One vector is two files (0600): ``SERIAL.safetensors``, the signed vector as it travels, and
``SERIAL.json``, what became of it; a withdrawn one has ``SERIAL.withdrawal`` in place of the
first. The vector is written before its JSON file and the JSON file is replaced as a whole, so a
kill at any moment leaves each vector wholly here or not at all.

What a receipt says is a server's word about itself: it changes what is shown and what is
delivered again, and never what was charged.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from client_app.hospital import Hospital
from common.errors import ConfigError
from common.files import atomic_write, read_json
from common.messages import MAX_WITHDRAWALS, Offer, Receipt
from common.privacy.limits import PrivacyLimits
from common.secagg import Identity
from common.vectors import SignedVector, Withdrawal

ACCEPTED = "accepted"
TOO_OLD = ("vector-stale", "vector-base")
"""Codes with which a server refuses vectors of a base that it no longer takes, or never had."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One vector. ``run``: for which it was made, at ``version`` of its bases.

    ``handed``: runs to whose server it was given; ``receipts``: run → ``accepted`` or the code of
    the refusal; ``told``: runs that have confirmed its withdrawal.
    """

    serial: str
    base: str
    run: str
    version: int
    bucket: int
    epsilon: float | None
    created: str
    handed: tuple[str, ...] = ()
    receipts: Mapping[str, str] = field(default_factory=dict)
    withdrawn: bool = False
    told: tuple[str, ...] = ()

    @property
    def private(self) -> bool:
        """Whether it was trained with differential privacy."""
        return self.epsilon is not None

    @property
    def state(self) -> str:
        """``withdrawn``, ``waiting``, ``sent`` or ``refused: CODE``, for people."""
        if self.withdrawn:
            return "withdrawn" if set(self.handed) <= set(self.told) else "withdrawal waits"
        codes = [code for code in self.receipts.values() if code != ACCEPTED]
        if ACCEPTED in self.receipts.values():
            return "sent"
        return f"refused: {', '.join(sorted(set(codes)))}" if codes else "waiting"


class Outbox:
    """The folder. ConfigError for a file in it that cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """With no other process at the same work (``name``): asked twice, one trains once."""
        path = self.folder / f".{name}.lock"
        with path.open("w") as file:
            path.chmod(0o600)
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def items(self) -> list[Item]:
        """Every vector that was ever made, the oldest first."""
        found = [self._read(path) for path in self.folder.glob("*.json")]
        return sorted(found, key=lambda item: (item.created, item.serial))

    def keep(self, signed: SignedVector, *, run: str, version: int) -> Item:
        """Put a vector into the outbox."""
        v = signed.vector
        item = Item(
            serial=v.serial, base=v.base, run=run, version=version, bucket=v.bucket,
            epsilon=v.epsilon, created=v.created,
        )  # fmt: skip
        atomic_write(self._vector(v.serial), signed.to_bytes(), mode=0o600)
        self._write(item)
        return item

    def choose(self, offer: Offer, *, private: bool) -> Item | None:
        """What to deliver to whoever offers a base; None: train.

        First what was made for that base, then what was made for the run from another base and
        has no receipt yet. A vector without privacy answers no offer that asks for privacy.
        """
        mine = [i for i in self.items() if not i.withdrawn and (i.private or not private)]
        for item in reversed(mine):  # the newest
            if item.base == offer.base:
                return item
        return next((i for i in mine if i.run == offer.run and offer.run not in i.receipts), None)

    def withdrawn(self, offer: Offer) -> bool:
        """Whether the hospital took back what it made from the offered base."""
        return any(i.withdrawn and i.base == offer.base for i in self.items())

    def retired(self, run: str) -> bool:
        """Whether the run's server has refused the last vector since its base is too old."""
        receipts = [item.receipts[run] for item in self.items() if run in item.receipts]
        return bool(receipts) and receipts[-1] in TOO_OLD

    def hand_over(self, item: Item, run: str) -> bytes:
        """The vector as it travels; that it went to ``run`` is noted first."""
        with self._changing():
            item = self._read(self._json(item.serial))
            if run not in item.handed:
                self._write(replace(item, handed=(*item.handed, run)))
        try:
            return self._vector(item.serial).read_bytes()
        except OSError as error:
            raise _unreadable(self._vector(item.serial), error) from None

    def take(self, receipt: Receipt) -> list[Item]:
        """Note what a server says has become of vectors of this outbox; returns those changed.

        What was never handed to that run is passed over.
        """
        changed = []
        outcomes = dict.fromkeys(receipt.accepted, ACCEPTED) | dict(receipt.refused)
        with self._changing():
            for item in self.items():
                new = item
                if item.serial in outcomes and receipt.run in item.handed:
                    given = {**item.receipts, receipt.run: outcomes[item.serial]}
                    new = replace(new, receipts=given)
                if item.withdrawn and item.serial in receipt.withdrawn:
                    new = replace(new, told=tuple(dict.fromkeys((*item.told, receipt.run))))
                if new != item:
                    self._write(new)
                    changed.append(new)
        return changed

    def withdraw(self, serial: str, hospital: str, identity: Identity) -> Item:
        """Take a vector back: its file goes, a signed withdrawal waits for whoever has it.

        Once more changes nothing. ConfigError for a serial that is not here.
        """
        if serial not in {item.serial for item in self.items()}:
            raise ConfigError(
                f"there is no vector {serial} in {self.folder}",
                "see what there is: consilium hospital outbox",
            )
        with self._changing():
            item = self._read(self._json(serial))
            if not item.withdrawn:
                signed = Withdrawal.sign(hospital, serial, identity)
                atomic_write(self._withdrawal(serial), signed.to_bytes(), mode=0o600)
                item = replace(item, withdrawn=True)
                self._write(item)
            self._vector(serial).unlink(missing_ok=True)
            return item

    def withdrawals(self, run: str) -> tuple[bytes, ...]:
        """Signed withdrawals that ``run``'s server has not confirmed, of what it was handed."""
        waiting = [
            item for item in self.items()
            if item.withdrawn and run in item.handed and run not in item.told
        ]  # fmt: skip
        return tuple(self._withdrawal(i.serial).read_bytes() for i in waiting[:MAX_WITHDRAWALS])

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """What is read of an item inside is still so when it is written.

        Else a receipt that the node takes while somebody withdraws the vector by a command would
        write over the withdrawal, which nobody would hear of any more.
        """
        with self.alone("items"):
            yield

    def _vector(self, serial: str) -> Path:
        return self.folder / f"{serial}.safetensors"

    def _withdrawal(self, serial: str) -> Path:
        return self.folder / f"{serial}.withdrawal"

    def _json(self, serial: str) -> Path:
        return self.folder / f"{serial}.json"

    def _write(self, item: Item) -> None:
        text = json.dumps(asdict(item), indent=2) + "\n"
        atomic_write(self._json(item.serial), text, mode=0o600)

    def _read(self, path: Path) -> Item:
        told: Any = read_json(path)
        try:
            lists = {name: tuple(told[name]) for name in ("handed", "told")}
            item = Item(**{**told, **lists})
            texts = (item.serial, item.base, item.run, item.created, *item.handed, *item.told)
            if not all(isinstance(x, str) for x in (*texts, *dict(item.receipts).values())):
                raise TypeError("a text is something else")
            return item
        except (TypeError, KeyError, ValueError) as error:
            raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path} in the outbox cannot be read ({type(error).__name__})",
        "restore it from the hospital's backup, or move the vector's files away: it is then lost",
    )


def outbox_of(hospital: Hospital, run: str) -> Outbox:
    """A hospital's outbox: one for all runs.

    In a simulation without a policy each run has one for itself, as it has its own ledger: the
    next run's data, epochs or ε may be others, and no vector must be taken for one of them.
    """
    alone = hospital.own is None and hospital.policy.privacy == PrivacyLimits.none()
    home = hospital.run_directory(run) if alone else hospital.home
    return Outbox(home / "outbox")
