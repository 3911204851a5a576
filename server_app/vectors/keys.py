"""Which public key is which hospital's: the roster's; in a simulation whichever came first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common.errors import ProtocolError
from common.files import read_json, write_json


class Keys:
    """The keys that signatures are checked with. Without a roster nothing is authenticated.

    The first key that a hospital shows is then believed, and kept in ``path`` beside the
    registry, so that nobody else can take its place later, not even in a resumed run.
    """

    def __init__(self, roster: Mapping[str, bytes] | None, path: Path) -> None:
        self._roster = roster
        self._path = path
        self._seen: dict[str, str] = {}
        if roster is None and path.exists():
            self._seen = dict(read_json(path))

    def of(self, node: str, hospital: str, shown: bytes) -> Mapping[str, bytes]:
        """The one key that a delivery of ``node``'s may be signed with, by the hospital's name.

        ProtocolError if it names another hospital than the one that was asked, or another key
        than before. Empty for a hospital that is not on the roster.
        """
        if hospital != node:
            raise ProtocolError(f"{node} answers as '{hospital}'", "update its node")
        if self._roster is not None:
            return {node: self._roster[node]} if node in self._roster else {}
        if len(shown) != 32:
            raise ProtocolError(f"{node} shows no identity key", "update its node")
        if self._seen.setdefault(node, shown.hex()) != shown.hex():
            raise ProtocolError(
                f"{node} shows another identity key than before",
                "restore the hospital's key, or start a new run",
            )
        write_json(self._path, self._seen)
        return {node: shown}
