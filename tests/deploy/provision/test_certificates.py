"""Certificates hold in a real TLS handshake, by OpenSSL's rules and not only by our own reading."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID

from common.errors import ConfigError
from common.federation_file import EnrolmentError
from deploy.provision import certificates, federation
from deploy.provision.federation import FederationFolder
from deploy.provision.keys import load_tls_key
from tests.deploy.provision.conftest import settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> FederationFolder:
    """A federation made just now: TLS looks at the real clock."""
    made = FederationFolder(tmp_path_factory.mktemp("tls") / "fed")
    hosts = ("127.0.0.1", "::1", "fl.example.org")
    federation.init(made, settings(hosts=hosts), datetime.now(UTC), days=30)
    return made


def handshake(folder: FederationFolder, authority: Path, host: str) -> str:
    """Connect as a SuperNode would, over loopback; the peer's answer, or ssl.SSLError."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder.server, folder.server_key)
    client = ssl.create_default_context(cafile=str(authority))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)

        def serve() -> None:
            try:
                connection, _ = listening.accept()
                with server.wrap_socket(connection, server_side=True) as stream:
                    stream.sendall(b"well met")
            except OSError:
                pass  # the client refused: that is what the tests look at

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with (
                socket.create_connection(listening.getsockname(), timeout=10) as connection,
                client.wrap_socket(connection, server_hostname=host) as stream,
            ):
                return stream.recv(100).decode()
        finally:
            thread.join()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "fl.example.org"])
def test_a_client_with_the_authority_connects_by_every_name(
    folder: FederationFolder, host: str
) -> None:
    assert handshake(folder, folder.authority, host) == "well met"


@pytest.mark.parametrize("host", ["example.org", "127.0.0.2", "localhost.example.org"])
def test_another_name_is_refused(folder: FederationFolder, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(folder, folder.authority, host)


def test_another_authority_is_refused(folder: FederationFolder, tmp_path: Path) -> None:
    other = FederationFolder(tmp_path / "other")
    federation.init(other, settings(), datetime.now(UTC), days=30)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(folder, other.authority, "localhost")


def test_an_expired_certificate_is_refused(tmp_path: Path) -> None:
    old = FederationFolder(tmp_path / "old")
    federation.init(old, settings(), datetime.now(UTC) - timedelta(days=31), days=30)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(old, old.authority, "localhost")
    federation.renew(old, datetime.now(UTC), days=30)
    assert handshake(old, old.authority, "localhost") == "well met"


def test_the_server_cannot_sign_certificates(folder: FederationFolder, tmp_path: Path) -> None:
    rogue = certificates.make_server(
        "blood",
        ["localhost"],
        load_tls_key(folder.server_key).public_key(),
        certificates.load_certificate(folder.server),
        load_tls_key(folder.server_key),
        datetime.now(UTC),
        30,
    )
    chain = tmp_path / "fed"
    chain.mkdir()
    (chain / "tls.crt").write_bytes(rogue + folder.server.read_bytes())
    (chain / "private").symlink_to(folder.private)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(FederationFolder(chain), folder.authority, "localhost")


def test_openssl_accepts_the_chain_strictly(folder: FederationFolder) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    answer = subprocess.run(
        [openssl, "verify", "-x509_strict", "-purpose", "sslserver", "-check_ss_sig",
         "-verify_hostname", "localhost", "-CAfile", folder.authority, folder.server],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.endswith("OK\n")


def test_the_profile_is_what_it_says(folder: FederationFolder) -> None:
    authority = x509.load_pem_x509_certificate(folder.authority.read_bytes())
    server = x509.load_pem_x509_certificate(folder.server.read_bytes())
    basic = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical and basic.value.ca and basic.value.path_length == 0
    usage = server.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical and usage.value.digital_signature and not usage.value.key_cert_sign
    extended = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(extended) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    for one in (authority, server):
        key = one.public_key()
        assert isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP384R1)
    assert certificates.hosts_of(server) == ["localhost", "127.0.0.1", "::1", "fl.example.org"]
    assert server.not_valid_after_utc - server.not_valid_before_utc == timedelta(days=30, hours=1)


def test_a_server_certificate_never_outlasts_its_authority(folder: FederationFolder) -> None:
    authority = certificates.load_certificate(folder.authority)
    key = load_tls_key(folder.authority_key)
    end = authority.not_valid_after_utc
    late = end - timedelta(days=3)
    made = certificates.make_server("b", ["x"], key.public_key(), authority, key, late, 30)
    assert x509.load_pem_x509_certificate(made).not_valid_after_utc == end
    with pytest.raises(ConfigError, match="authority ended"):
        certificates.make_server("b", ["x"], key.public_key(), authority, key, end, 30)


def test_only_an_authority_passes_for_one(folder: FederationFolder) -> None:
    now = datetime.now(UTC)
    authority = certificates.load_certificate(folder.authority)
    certificates.check_authority(authority, now)
    with pytest.raises(EnrolmentError, match="not the certificate of a certificate authority"):
        certificates.check_authority(certificates.load_certificate(folder.server), now)
    with pytest.raises(EnrolmentError, match="not today"):
        certificates.check_authority(authority, now + timedelta(days=4000))


def test_renewal_keeps_key_and_authority_and_takes_the_new_names(tmp_path: Path) -> None:
    folder = FederationFolder(tmp_path / "fed")
    federation.init(folder, settings(), datetime.now(UTC), days=30)
    before = certificates.load_certificate(folder.server)
    kept = {p: p.read_bytes() for p in (folder.authority, folder.server_key, folder.authority_key)}
    folder.settings.write_text(settings(address="fl.example.org:443").to_toml())
    federation.renew(folder, datetime.now(UTC), days=60)
    after = certificates.load_certificate(folder.server)
    assert kept == {path: path.read_bytes() for path in kept}
    assert after.public_key() == before.public_key()
    assert after.serial_number != before.serial_number
    assert handshake(folder, folder.authority, "fl.example.org") == "well met"
