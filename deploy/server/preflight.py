"""What must be right before the server starts, told at once and in two parts."""

from __future__ import annotations

import ipaddress
import socket
from datetime import datetime

from common.errors import ConfigError
from deploy.provision import certificates, keys
from deploy.provision.certificates import belongs_to, hosts_of, issued_by
from deploy.provision.federation import FederationFolder, Settings
from deploy.provision.files import is_open

_SOON = 30


def check(folder: FederationFolder, now: datetime) -> list[str]:
    """Certificate, keys and roster of the folder; what a person should see to soon.

    ConfigError for what would keep hospitals from connecting, or lays a key open. The authority's
    and the coordinator's private keys are not needed to serve, and may be elsewhere.
    """
    settings = folder.load()
    renew = f"consilium federation renew {folder.root}"
    for path in (folder.coordinator_key, folder.authority_key):
        if path.exists() and is_open(path):
            raise ConfigError(
                f"others than its owner may read the private key {path}",
                f"chmod 600 {path}; if somebody may have read it, begin a new federation",
            )
    server = certificates.load_certificate(folder.server)
    authority = certificates.load_certificate(folder.authority)
    if not belongs_to(server, keys.load_tls_key(folder.server_key)):
        raise ConfigError(
            f"{folder.server_key} is not the key of {folder.server}",
            f"restore both from a backup, or make a new certificate: {renew}",
        )
    if not issued_by(server, authority):
        raise ConfigError(
            f"{folder.server} is not of the authority {folder.authority}, which hospitals were "
            "given",
            f"restore both from a backup, or make a new certificate: {renew}",
        )
    for what, one, remedy in (
        (folder.server, server, renew),
        (folder.authority, authority, "make a new federation, and have the hospitals join it"),
    ):
        if not one.not_valid_before_utc <= now < one.not_valid_after_utc:
            raise ConfigError(
                f"{what} is valid from {one.not_valid_before_utc.date()} to "
                f"{one.not_valid_after_utc.date()}, and not today",
                f"check this machine's clock; else: {remedy}",
            )
    missing = sorted(set(settings.names()) - set(hosts_of(server)))
    if missing:
        raise ConfigError(
            f"{folder.server} is not for {', '.join(missing)}, where hospitals look for it",
            renew,
        )
    for path in (folder.roster, folder.description):
        if not path.exists():
            raise ConfigError(f"{path} is missing", f"consilium federation refresh {folder.root}")
    left = certificates.days_left(server, now)
    return [f"the server's certificate ends in {left} days: {renew}"] if left <= _SOON else []


def check_free(host: str, port: int) -> None:
    """ConfigError if the server cannot listen there."""
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        raise ConfigError(
            f"{host!r} is no IP address to listen on",
            "use 0.0.0.0 (all), :: (all, IPv6 too) or 127.0.0.1 (this machine only)",
        ) from None
    with socket.socket(family) as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            attempt.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"the server cannot listen on {host}, port {port} ({error.strerror})",
                "stop what uses the port, or choose another with --port (and set the address that "
                "hospitals use in federation.toml); below 1024 it takes a privilege",
            ) from None


def certificate_name(settings: Settings) -> str:
    """The name that hospitals look for in the certificate."""
    return settings.names()[0]
