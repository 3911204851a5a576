"""Whether a server answers as its hospitals would see it."""

from __future__ import annotations

import ipaddress
import ssl

import httpx

from common.errors import ConfigError, ConsiliumError
from common.federation_file import split_address
from deploy.provision.federation import FederationFolder
from deploy.server.layout import Server, ServerFolder

TIMEOUT = 5.0


def healthy(folder: FederationFolder, server: Server) -> bool:
    """Whether gate and SuperLink answer now."""
    try:
        ask(folder, server.gate_host, server.gate_port)
    except ConsiliumError:
        return False
    return True


def check_health(folder: FederationFolder, port: int | None) -> None:
    """ConsiliumError unless the gate answers on this machine under the federation's authority.

    ``port``: None for where the running server listens, or else the federation's address.
    """
    control = ServerFolder(folder.root).control
    host, listening = "", port or split_address(folder.load().address)[1]
    try:
        server = Server.read(control)
        host, listening = server.gate_host, port or server.gate_port
    except ConfigError:
        pass  # it is asked all the same, and said below that nobody answers
    ask(folder, host, listening)


def ask(folder: FederationFolder, host: str, port: int) -> None:
    """``GET /health`` from this machine; ConsiliumError unless the answer is 200."""
    name = folder.load().names()[0]
    try:
        context = ssl.create_default_context(cafile=str(folder.authority))
        with httpx.Client(verify=context, timeout=TIMEOUT, trust_env=False) as client:
            answer = client.get(
                f"https://{_reachable(host)}:{port}/health",
                headers={"host": name},
                extensions={"sni_hostname": name},
            )
    except (httpx.HTTPError, OSError) as error:
        why = str(error) or type(error).__name__
        raise ConsiliumError(
            f"nobody answers for the federation on port {port} of this machine ({why})",
            f"is it served? consilium federation serve {folder.root}; its logs are in "
            f"{ServerFolder(folder.root).logs}",
        ) from None
    if answer.status_code != 200:
        raise ConsiliumError(
            f"the gate answers, but not what is behind it (HTTP {answer.status_code})",
            f"wait, it may be starting; else read {ServerFolder(folder.root).logs}",
        )


def _reachable(host: str) -> str:
    """Where to ask for a server that listens on ``host``."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "127.0.0.1"
    if address.is_unspecified:
        return "127.0.0.1"
    return f"[{address}]" if address.version == 6 else str(address)
