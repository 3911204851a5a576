"""An object whose arrival was confirmed to nobody has arrived all the same.

Flower 1.41's store takes each object of a message once. Where the SuperLink dies between taking
one and saying so, the sender asks again, is told "not stored", and fails: a run would end of a
restart of the SuperLink that it could outlive. Here the sender then looks whether the object is
there.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from flwr.proto.message_pb2 import PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

_MAKE = "make_push_object_fn_protobuf"


def forgive_lost_answers(module: ModuleType) -> None:
    """Have ``module``, which pushes objects by Flower's own function, look before it fails.

    RuntimeError if it has no such function any more. The client whose method pushes must have
    ``PullObject``, as Flower's runtime and fleet clients do.
    """
    make = getattr(module, _MAKE, None)
    if make is None:
        raise RuntimeError(f"Flower's {module.__name__} has no {_MAKE} any more")

    def forgiving(
        push_object_protobuf: Any, node: Node, run_id: int, session_id: str
    ) -> Callable[[str, bytes], None]:
        push = make(push_object_protobuf, node, run_id, session_id)

        def push_or_find(object_id: str, content: bytes) -> None:
            try:
                push(object_id, content)
            except ObjectPushError:
                asked = PullObjectRequest(node=node, run_id=run_id, object_id=object_id)
                found = push_object_protobuf.__self__.PullObject(asked)
                # Its id is its hash; compared all the same.
                if not found.object_available or found.object_content != content:
                    raise

        return push_or_find

    vars(module)[_MAKE] = forgiving
