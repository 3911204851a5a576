"""The process that talks to the server: ``python -m deploy.node.supernode DIR HOST:PORT PORT``.

Flower's SuperNode with the node's key and the kit's authority, and no app in it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from client_app.hospital_file import HospitalFolder
from common.errors import ConsiliumError
from deploy.node.state import NodeState
from deploy.provision.keys import load_node_key
from deploy.runtime.flower import (
    die_with_parent,
    drop_what_ended,
    prompt_objects,
    prompt_retries,
    prompt_supernode,
)


def sign_off(folder: HospitalFolder, address: str, node_id: int) -> None:
    """Tell the server, under the node's key, that this node has gone; does nothing if it cannot.

    A server takes back a node that was killed only a minute after its last heartbeat; one that has
    signed off, at once.
    """
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    key = load_node_key(folder.node_key)
    try:
        with FleetHttpClient.from_server_address(
            address,
            False,
            folder.authority.read_bytes(),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        ) as client:
            client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
    except Exception as error:
        # It was signed off already, or nobody answers: the SuperNode itself will say what is wrong.
        print(f"not signed off ({type(error).__name__})", flush=True)


def keep_track(state: NodeState) -> None:
    """Note the node's number, and whenever the server has answered."""
    from flwr.supernode.fleet_http_client import FleetHttpClient

    def noting(call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            answer = call(*args, **kwargs)
            if call is activate:
                state.connected(answer.node_id)
            else:
                state.heard()
            return answer

        return noted

    activate = FleetHttpClient.ActivateNode
    for name in ("ActivateNode", "SendNodeHeartbeat", "PullMessages"):
        setattr(FleetHttpClient, name, noting(getattr(FleetHttpClient, name)))


def main(arguments: list[str]) -> None:
    """Be a SuperNode until told to stop, or until it can go on no more."""
    die_with_parent()
    root, address, port = arguments
    folder = HospitalFolder(Path(root).absolute())
    state = NodeState.of(folder)
    try:
        if (before := state.node_id()) is not None:
            sign_off(folder, address, before)
    except ConsiliumError as error:
        print(error, flush=True)
        sys.exit(1)
    prompt_objects()
    prompt_retries()
    prompt_supernode()
    drop_what_ended()
    keep_track(state)

    from flwr.supernode.cli.flower_supernode import flower_supernode

    sys.argv = [
        "flower-supernode",
        "--superlink", address,
        "--root-certificates", str(folder.authority),
        "--auth-supernode-private-key", str(folder.node_key),
        "--isolation", "process",
        "--superexec-auth-secret-file", str(state.secret),
        "--host", "127.0.0.1", "--port", port,
        "--node-config", f"hospital={_quoted(folder.root)}",
    ]  # fmt: skip
    status = 1
    try:
        flower_supernode()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    finally:
        # After some errors Flower returns with a thread left that would keep the process, deaf.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _quoted(path: Path) -> str:
    """As a TOML string, whatever characters are in it."""
    # Of JSON's texts all are TOML's, but for DEL, which TOML wants escaped.
    return json.dumps(str(path), ensure_ascii=False).replace("\x7f", "\\u007f")


if __name__ == "__main__":
    main(sys.argv[1:])
