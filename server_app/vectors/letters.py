"""What hospitals are sent: the current base to fine-tune, and receipts for what they delivered."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from common.config import RunConfig
from common.messages import Offer, Receipt
from common.vectors import Base
from server_app.directory import Directory
from server_app.vectors.post import Answer, Post
from server_app.vectors.record import Journal
from server_app.vectors.standing import Standing

KNOCK = 60.0
"""Seconds after which a hospital that has delivered is asked whether it takes something back."""
HEARING = 30.0
"""Seconds that a resumed run waits to hear what was taken back while no server ran."""
FAREWELL = 10.0
"""Seconds that receipts have at the end."""

Read = Callable[[Answer], None]
"""What is done with an answer that comes while letters are waited for."""


@dataclass(frozen=True)
class Letters:
    """Who is sent what, by where the run stands with each hospital."""

    config: RunConfig
    run_id: str
    directory: Directory
    post: Post
    journal: Journal
    standing: Mapping[str, Standing]
    """By hospital; it makes one for a hospital that is new."""
    current: Callable[[], Base]
    """The base that is offered now."""

    def ask(self) -> None:
        """Each hospital that owes nothing: its receipt, else the current base."""
        current = self.current()
        there, _ = self.directory.reach(self.directory.names)
        for name, node in there.items():
            standing = self.standing[name]
            if not self.post.free(name):
                continue
            quiet = time.monotonic() - standing.heard
            if standing.due or (standing.done == current.version and quiet > KNOCK):
                self._send_receipt(name, node)
            elif standing.done != current.version:
                offer = Offer(
                    run=self.run_id, version=current.version, base=current.id,
                    model_digest=current.model_digest, weights=current.weights,
                )  # fmt: skip
                self.post.send(
                    name, node, "offer", offer.to_record(),
                    version=offer.version, timeout=self.config.vector_timeout,
                )  # fmt: skip

    def hear_out(self, read: Read) -> None:
        """What was taken back while no server ran: everybody who is there is asked."""
        there, _ = self.directory.reach(self.directory.names)
        for name in sorted(self._receipts(HEARING, set(there), read)):
            self.journal.trouble(
                name, "did not say in time whether it takes a vector back; it is asked again later"
            )

    def farewell(self, read: Read) -> None:
        """Nobody is asked any more; receipts that are due have a few seconds."""
        self._receipts(FAREWELL, set(), read)
        if busy := sorted(self.post.open("offer")):
            self.journal.say(
                f"still training: {', '.join(busy)}; what they make stays in their outbox, for a "
                f"run with resume={self.run_id}"
            )

    def _receipts(self, seconds: float, unheard: set[str], read: Read) -> set[str]:
        """Receipts for ``unheard`` and for whoever is due one; ``seconds`` at most.

        Returns those of ``unheard`` that have not answered.
        """
        there, _ = self.directory.reach(self.directory.names)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for name, node in there.items():
                if (self.standing[name].due or name in unheard) and self.post.free(name):
                    self._send_receipt(name, node)
            if not unheard and not self.post.open("receipt"):
                break
            for answer in self.post.collect():
                read(answer)
                if self.post.free(answer.letter.hospital):  # else it is to be asked again
                    unheard.discard(answer.letter.hospital)
            self.post.rest()
        return unheard

    def _send_receipt(self, name: str, node: int) -> None:
        standing = self.standing[name]
        receipt = Receipt(
            run=self.run_id,
            accepted=tuple(standing.accepted),
            refused=dict(standing.refused),
            withdrawn=tuple(standing.withdrawn),
        )
        standing.told = receipt
        timeout = min(600.0, self.config.vector_timeout)
        self.post.send(name, node, "receipt", receipt.to_record(),
                       version=self.current().version, timeout=timeout)  # fmt: skip
