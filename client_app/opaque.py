"""From private data on, one code: a refusal must not tell of the data that it came of.

A server chooses the model and the settings, and can choose them so that one image, or one image
more, makes a computation fail. Were each failure told by its own name, at the moment and for the
reason that it has, refusals would answer questions about single images that no noise covers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import ConsiliumError


class WorkFailed(ConsiliumError):
    """Something failed after private data was looked at; all that a server learns of it."""

    code = "failed"


@contextmanager
def one_code() -> Iterator[None]:
    """Whatever the block raises becomes :class:`WorkFailed`; the cause stays in the own log."""
    try:
        yield
    except WorkFailed:
        raise
    except Exception as error:
        raise WorkFailed(
            "the work on this hospital's images failed: the cause stands above",
            "mend what it names; the server is told that the work failed, and nothing else",
        ) from error
