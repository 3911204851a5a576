"""Enrolment: who belongs to a federation, without any private key leaving where it was made.

The coordinator makes a federation; each hospital makes its own keys and a request, signed by
both of them; the coordinator admits it by its fingerprint, told by another channel, and hands
over a kit; the hospital joins with it, after the coordinator's fingerprint was told the same way.

Whom the coordinator admits is on the roster; with whom a hospital shares sums, its own people say
(:mod:`client_app.members`). A server needs neither ``ca.key`` nor ``coordinator.key`` in its
folder: they belong on another machine, and what is signed there is copied
(:data:`deploy.provision.federation.SIGNED_PARTS`).

The coordinator's folder::

    DIR/                     0700
      federation.toml        what it is: the coordinator's, to edit (then `federation refresh`)
      coordinator.pub        base64 of the 32-byte Ed25519 key
      ca.crt  tls.crt        X.509, PEM: the authority, and the server's certificate
      roster.json            signed: see common/secagg/roster.py
      federation.json        signed: see common/federation_file.py
      revoked.json           keys that are never admitted again, and why
      private/               0700
        ca.key  tls.key      0600: ECDSA P-384, PKCS #8, PEM
        coordinator.key      0600: Ed25519, 32 raw bytes
      hospitals/NAME.json    an admitted hospital: its request, and from when to when
      hospitals/NAME.pub     its node's public key, OpenSSH: what the SuperLink may register
      kits/NAME/             what the hospital is sent: nothing in it is secret
        ca.crt  roster.json  federation.json  coordinator.pub  README.txt

What counts is ``federation.toml``, ``hospitals/*.json`` and ``revoked.json``: each command changes
one of them in one step, and makes roster, kits and ``*.pub`` from them afterwards. So a crash
leaves nothing that `consilium federation refresh` (or the same command again) doesn't complete.

The hospital's folder is described in :mod:`client_app.hospital_file`.
"""
