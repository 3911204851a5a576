"""Where a run stands with one hospital: what it has answered, and what it is still to be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.messages import Receipt


@dataclass
class Standing:
    """One hospital: for which version it delivered or refused, and the receipt that it is due."""

    done: int = -1
    refusal: str = ""
    heard: float = 0.0
    accepted: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    withdrawn: list[str] = field(default_factory=list)
    told: Receipt | None = None
    """The receipt that is under way: more may become due meanwhile."""

    def heard_receipt(self) -> None:
        """What was told is due no more."""
        told, self.told = self.told, None
        if told is not None:
            self.accepted = [s for s in self.accepted if s not in told.accepted]
            self.withdrawn = [s for s in self.withdrawn if s not in told.withdrawn]
            self.refused = {s: c for s, c in self.refused.items() if told.refused.get(s) != c}

    @property
    def due(self) -> bool:
        """Whether there is anything to tell it."""
        return bool(self.accepted or self.refused or self.withdrawn)
