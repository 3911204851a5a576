"""Runs behind the commands on vectors wait as briefly as those of the server's own tests."""

from __future__ import annotations

from tests.server_app.vectors.conftest import base, quick

__all__ = ["base", "quick"]  # fixtures
