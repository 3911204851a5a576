"""Files that survive a kill: written beside, flushed to the disk, then renamed over."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from common import parsing
from common.errors import ConfigError


def consilium_home() -> Path:
    """``$CONSILIUM_HOME``, by default ``.consilium`` in the home directory."""
    return Path(os.environ.get("CONSILIUM_HOME") or Path.home() / ".consilium").expanduser()


def atomic_write(path: Path, content: bytes | str, mode: int = 0o644) -> None:
    """Replace ``path`` by ``content``: a reader, or a kill, sees the old file or the new one.

    ``mode`` is set before the file has its name, so a private file is never readable by others.
    """
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    # The rename itself is durable only once the directory is.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Write ``value`` as indented JSON, atomically."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", mode)


def read_json(path: Path) -> Any:
    """Read a JSON file; ConfigError names the file if it is missing or no JSON."""
    try:
        return parsing.parse_json(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", "check the path or the run's id") from None
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"{path} cannot be read as JSON: {e}", "restore the file from a backup"
        ) from None
