"""X.509: the federation's own certificate authority, and the server's certificate under it.

Profile of RFC 5280: the authority may sign servers' certificates only (path length 0); the
server's holds its names as subject alternative names and serves TLS servers only. Both are
ECDSA P-384 with SHA-384, and pass OpenSSL's strict check.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import (
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError
from common.federation_file import EnrolmentError, read_limited

AUTHORITY_DAYS = 3650
_SKEW = timedelta(hours=1)
"""Hospitals' clocks that run behind by so much still accept a new certificate."""


def make_authority(federation: str, key: EllipticCurvePrivateKey, now: datetime) -> bytes:
    """The federation's self-signed authority, PEM, for :data:`AUTHORITY_DAYS`."""
    name = _name(federation, "consilium federation CA")
    certificate = (
        _builder(name, name, key.public_key(), now, now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, SHA384())
    )
    return certificate.public_bytes(Encoding.PEM)


def make_server(
    federation: str,
    hosts: Sequence[str],
    public: EllipticCurvePublicKey,
    authority: x509.Certificate,
    key: EllipticCurvePrivateKey,
    now: datetime,
    days: int,
) -> bytes:
    """A server's certificate, PEM, for the DNS names and IP addresses ``hosts``.

    It ends with the authority at the latest. ConfigError if the authority has ended.
    """
    last = authority.not_valid_after_utc
    if last <= now:
        raise ConfigError(
            f"the federation's certificate authority ended on {last.date()}",
            "make a new federation, and have the hospitals join it",
        )
    names = x509.SubjectAlternativeName([_alternative(host) for host in hosts])
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    certificate = (
        _builder(
            _name(federation, "consilium federation server"),
            authority.subject,
            public,
            now,
            min(now + timedelta(days=days), last),
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(names, critical=False)
        .add_extension(issuer_key, critical=False)
        .sign(key, SHA384())
    )
    return certificate.public_bytes(Encoding.PEM)


def load_certificate(path: Path) -> x509.Certificate:
    """The one certificate of a PEM file; ConfigError if it cannot be read or is none."""
    return parse_certificate(read_limited(path), path)


def parse_certificate(data: bytes, where: str | Path) -> x509.Certificate:
    """The one certificate of PEM bytes; ConfigError naming ``where`` otherwise."""
    try:
        (certificate,) = x509.load_pem_x509_certificates(data)
    except ValueError:
        raise ConfigError(
            f"{where} is not one certificate in PEM", "restore it from a backup, or get it anew"
        ) from None
    return certificate


def check_authority(certificate: x509.Certificate, now: datetime) -> None:
    """EnrolmentError unless it is an authority's own certificate that is valid ``now``."""
    try:
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        certificate.verify_directly_issued_by(certificate)
        ok = basic.ca and usage.key_cert_sign
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError, TypeError,
            InvalidSignature):  # fmt: skip
        ok = False
    if not ok:
        raise EnrolmentError(
            "ca.crt is not the certificate of a certificate authority",
            "get the kit anew from the coordinator",
        )
    if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
        raise EnrolmentError(
            f"ca.crt is valid from {certificate.not_valid_before_utc.date()} to "
            f"{certificate.not_valid_after_utc.date()}, and not today",
            "check this machine's clock; else get the kit anew from the coordinator",
        )


def belongs_to(certificate: x509.Certificate, key: EllipticCurvePrivateKey) -> bool:
    """Whether the certificate's key is ``key``'s public half."""
    return certificate.public_key() == key.public_key()


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether ``authority`` signed the certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The DNS names and IP addresses that a server's certificate is for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in found]


def digest(certificate: x509.Certificate) -> bytes:
    """SHA-256 of its DER encoding, 32 bytes."""
    return certificate.fingerprint(SHA256())


def days_left(certificate: x509.Certificate, now: datetime) -> int:
    """Whole days until it ends; negative once it has."""
    return (certificate.not_valid_after_utc - now).days


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: EllipticCurvePublicKey,
    now: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now.astimezone(UTC) - _SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _name(federation: str, role: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.COMMON_NAME, role),
        ]
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
