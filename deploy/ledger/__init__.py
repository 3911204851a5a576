"""``consilium ledger``: what a hospital's images were used for, for its data-protection officer.

:mod:`commands` reads the arguments, :mod:`choice` finds the ledger and the policy, :mod:`opening`
opens and checks it, :mod:`view` makes the document of ``show``, :mod:`text` prints it,
:mod:`export` writes it down for an audit.

Importing this loads nothing heavy: each command imports what it needs.
"""

from deploy.ledger import commands

__all__ = ["commands"]
