"""Hands each member its own kit, so that nobody carries one when another hospital joins."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from starlette.responses import PlainTextResponse, Response

from common.errors import ConsiliumError
from common.federation_file import FederationFile, read_limited
from deploy.provision.federation import FederationFolder
from deploy.provision.kit import DESCRIPTION, ROSTER, SIGNED
from deploy.provision.members import members
from deploy.runtime.kit_request import KitRefused, verify
from deploy.runtime.seldom import Seldom
from deploy.server.stamp import stamp


class Kits:
    """The kits of a coordinator's folder, for those who sign for them."""

    def __init__(self, folder: FederationFolder, say: Callable[[str], None]) -> None:
        """``say``: one line for the log."""
        self._folder, self._say = folder, Seldom(say)
        self._lock = threading.Lock()
        self._known: tuple[object, str, dict[str, bytes]] | None = None

    def answer(self, headers: Mapping[str, str]) -> Response:
        """The answer to a request with these headers (names in lower case).

        200 with ``{"files": {name: base64}}``, 304, 403 for everybody but a member, 503 where the
        kit is just being written or cannot be read.
        """
        try:
            federation, identities = self._members()
            hospital = verify(headers, federation, identities, datetime.now(UTC))
            files = self._files(self._folder.kits / hospital)
        except KitRefused as refusal:
            self._say("a request for a kit was refused: no member, or not signed by one now")
            return PlainTextResponse(refusal.what + "\n", 403)
        except (ConsiliumError, OSError) as error:
            self._say(f"! a kit could not be read: {error}", "unread")
            return PlainTextResponse("the kit is not ready\n", 503)
        etag = f'"{hashlib.sha256(files[DESCRIPTION]).hexdigest()}"'
        if headers.get("if-none-match") == etag:
            return Response(status_code=304, headers={"etag": etag})
        self._say(f"{hospital} has fetched its kit")
        told = {name: base64.b64encode(data).decode() for name, data in files.items()}
        body = json.dumps({"files": told})
        return Response(body, media_type="application/json", headers={"etag": etag})

    def _members(self) -> tuple[str, dict[str, bytes]]:
        """The federation's name and its members' identity keys, as they are now."""
        with self._lock:
            now = stamp(self._folder)
            if self._known is None or self._known[0] != now:
                # Every record's signatures are checked, so not for each request.
                keys = {m.name: m.request.identity for m in members(self._folder)}
                self._known = now, self._folder.load().name, keys
            return self._known[1], self._known[2]

    def _files(self, kit: Path) -> dict[str, bytes]:
        """A kit whose parts belong together; ConsiliumError while it is being written."""
        files = {name: read_limited(kit / name) for name in SIGNED}
        told = FederationFile.load(files[DESCRIPTION], self._folder.public_key())
        if told.roster_sha256 != hashlib.sha256(files[ROSTER]).digest():
            raise ConsiliumError(f"{kit} is being written", "wait; else: federation refresh")
        return files
