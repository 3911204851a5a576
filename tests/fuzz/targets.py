"""Every parser that reads bytes which somebody else may have made: name, function, seeds.

A parser may do two things with any bytes: return, or raise a :class:`ConsiliumError`. A new parser
gets a line in :func:`targets`; the short pass of ``make test`` and ``make fuzz`` go by that.
"""

from __future__ import annotations

import atexit
import base64
import io
import json
import logging
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from PIL import Image
from safetensors.numpy import save

from client_app.hospital_file import HospitalFile
from client_app.outbox import Outbox
from client_app.policy import HospitalPolicy
from common.config import KEYS, RunConfig
from common.datasets import load_npz
from common.datasets.listing import Listing
from common.datasets.manifest import list_manifest
from common.datasets.pictures import read_picture
from common.errors import ConsiliumError
from common.federation_file import Description, FederationFile, read_key
from common.files import read_json
from common.messages import (
    Comparison,
    Delivery,
    Envelope,
    Greeting,
    Job,
    Offer,
    Receipt,
    Refusal,
    Report,
)
from common.privacy.ledger import Ledger
from common.secagg import Identity, Roster, RosterEntry
from common.secagg import messages as m
from common.tensors import load_tensors
from common.vectors import Base, SignedVector, TaskVector, Withdrawal
from deploy.evaluate import spec_of
from deploy.ledger.export import verify_export
from deploy.node import kits
from deploy.node.code import shipped
from deploy.provision import certificates, keys
from deploy.provision.federation import FederationFolder
from deploy.provision.kit import SIGNED, Kit
from deploy.provision.requests import Request
from deploy.server.layout import Server
from server_app.vectors.manifest import Manifest
from tests.common.secagg.test_messages import BINDING, CONTEXT, READ, VECTORS
from tests.common.vectors.building import base as small_base
from tests.deploy.ledger.building import exported_json, train

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Target:
    """A parser of bytes. ``seeds``: what it reads without an error, to begin from."""

    name: str
    parse: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    reads: bool = True
    """Whether it returns for its seeds; False where they need a key or a clock of their own."""


@cache
def place() -> Path:
    """A folder of this process's own, for parsers of files."""
    made = Path(tempfile.mkdtemp(prefix="consilium-fuzz-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def in_file(name: str, parse: Callable[[Path], object]) -> Callable[[bytes], object]:
    """The parser of a file as one of bytes."""

    def of_bytes(data: bytes) -> object:
        path = place() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o600)  # as keys must be
        return parse(path)

    return of_bytes


# Flower's own parser makes records of a message; what it lets through is ours to doubt.


def packed_record(record: RecordDict) -> bytes:
    """A record's parts, types and values, for mutation."""
    parts: dict[str, Any] = {}
    for name, inner in record.items():
        if isinstance(inner, ArrayRecord):
            arrays = {k: [a.dtype, list(a.shape), a.stype, a.data] for k, a in inner.items()}
            parts[name] = ["arrays", arrays]
        else:
            kind = "config" if isinstance(inner, ConfigRecord) else "metrics"
            parts[name] = [kind, dict(inner)]
    return bytes(msgpack.packb(parts, use_bin_type=True))


class NoRecord(ConsiliumError):
    """Flower could not have made such a record."""


def unpacked_record(data: bytes) -> RecordDict:
    """What :func:`packed_record` packed; NoRecord for what no Flower message can hold."""
    try:
        parts = msgpack.unpackb(data, raw=False)
        record = RecordDict()
        for name, (kind, inner) in parts.items():
            if kind == "arrays":
                record[name] = ArrayRecord(
                    {k: Array(d, tuple(s), t, content) for k, (d, s, t, content) in inner.items()}
                )
            else:
                record[name] = ConfigRecord(inner) if kind == "config" else MetricRecord(inner)
    except Exception:
        raise NoRecord("no record", "none") from None
    return record


def of_record(read: Callable[[RecordDict], object]) -> Callable[[bytes], object]:
    """A reader of records as a parser of bytes."""
    return lambda data: read(unpacked_record(data))


def _records() -> list[Target]:
    weights = {"a.weight": np.ones((2, 3), np.float32), "b": np.array(1, np.int64)}
    digest, key = bytes(32), bytes(range(32))
    base = small_base()
    vector = Delivery(run="r", hospital="h", key=key, vector=b"v", withdrawals=(b"w", b"x"))
    job = Job("r", 1, digest, weights, b"i", {"c": np.zeros(2)}, ("a" * 64,))
    offer = Offer(run="r", version=0, base=base.id, model_digest=base.model_digest,
                  weights=base.weights)  # fmt: skip
    compared = Comparison(run="r", round=1, base=base.id, model_digest=base.model_digest,
                          current=base.weights, candidate=base.weights)  # fmt: skip
    receipt = Receipt(run="r", accepted=("a" * 32,), refused={"b" * 32: "policy"})
    report = Report("r", 1, "h", {"examples": 3.0, "val-examples": 1.0}, weights)
    return [
        Target(f"record {name}", of_record(read), (packed_record(record),))
        for name, read, record in (
            ("greeting", Greeting.from_record, Greeting("h").to_record()),
            ("refusal", Refusal.in_record, Refusal("policy", "0a").to_record()),
            ("job", Job.from_record, job.to_record()),
            ("report", lambda r: Report.from_record(r, run="r", round=1), report.to_record()),
            ("envelope", Envelope.from_record, Envelope(b"payload").to_record()),
            ("offer", Offer.from_record, offer.to_record()),
            ("delivery", lambda r: Delivery.from_record(r, run="r"), vector.to_record()),
            ("receipt", Receipt.from_record, receipt.to_record()),
            ("comparison", Comparison.from_record, compared.to_record()),
        )
    ]


def _secure_aggregation() -> list[Target]:
    good = {name: bytes.fromhex(VECTORS["good"][name]) for name in READ}
    return [
        *(Target(f"secagg {name}", read, (good[name],)) for name, read in READ.items()),
        # Of what is only relayed no fixed bytes are kept: from nothing, and from its parts.
        Target("secagg relay", lambda data: m.read_relay(CONTEXT, BINDING.params, data),
               (good["share statement"],), reads=False),
        Target("secagg signatures", lambda data: m.read_signatures(CONTEXT, BINDING.params, data),
               (good["signature"],), reads=False),
    ]  # fmt: skip


def _enrolment() -> list[Target]:
    hospital, coordinator = Identity(bytes(range(32))), Identity(bytes(range(1, 33)))
    roster = Roster("fed", (RosterEntry("h", hospital.public, "2020-01-01", "2099-01-01"),))
    told = Description.read(
        {"name": "fed", "address": "localhost:9092", "classes": ["a", "b"], "image-size": 28,
         "channels": 3}, "it",
    )  # fmt: skip
    federation = FederationFile(told, bytes(32), bytes(32), "2026-01-01T00:00:00Z")
    node: Any = load_ssh_private_key(keys.new_node_key(), None)
    request = Request.make("h", hospital, node, NOW).to_bytes()
    answer = {"files": {name: base64.b64encode(b"xx").decode() for name in SIGNED}}
    line = keys.node_line(node.public_key()).encode()

    def unpack(data: bytes) -> None:
        folder = place() / "kit"
        folder.mkdir(exist_ok=True)
        kits._unpack(data, folder)

    def kit_of(data: bytes) -> object:
        folder = place() / "kit-read"
        folder.mkdir(exist_ok=True)
        content = roster.sign(coordinator)
        for name in SIGNED:
            (folder / name).write_bytes(data if name != "roster.json" else content)
        (folder / "coordinator.pub").write_bytes(base64.b64encode(coordinator.public) + b"\n")
        return Kit.read(folder).verify(coordinator.public, NOW)

    settings = (
        b'version = 1\nname = "fed"\naddress = "localhost:9092"\nclasses = ["a", "b"]\n'
        b"image-size = 28\nchannels = 3\nhosts = []\n"
    )
    return [
        Target("roster", lambda data: Roster.load(data, coordinator.public),
               (roster.sign(coordinator),)),
        Target("federation file", lambda data: FederationFile.load(data, coordinator.public),
               (federation.sign(coordinator),)),
        Target("request", Request.parse, (request,)),
        Target("kit answer", unpack, (json.dumps(answer).encode(),)),
        Target("kit folder", kit_of, (federation.sign(coordinator),), reads=False),
        Target("certificate", lambda data: certificates.parse_certificate(data, "ca.crt"),
               (b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n",), reads=False),
        Target("public key", in_file("coordinator.pub", read_key),
               (base64.b64encode(coordinator.public),)),
        Target("identity key", in_file("identity.key", keys.load_identity), (bytes(32),)),
        Target("node key", in_file("node.key", keys.load_node_key), (keys.new_node_key(),),
               reads=False),
        Target("node's public key", _node_line, (line,)),
        Target("federation.toml",
               in_file("fed/federation.toml", lambda path: FederationFolder(path.parent).load()),
               (settings,), reads=False),
        Target("control.json", in_file("control.json", Server.read),
               (b'{"socket": "s", "authority": "a", "gate_host": "h", "gate_port": 1, '
                b'"pid": 1, "version": 2}',)),
    ]  # fmt: skip


def _node_line(data: bytes) -> object:
    # It promises a ValueError, which its callers turn into their own error.
    try:
        return keys.read_node_line(data.decode("utf-8", "surrogateescape"))
    except ValueError:
        return None


POLICY = (
    b'version = 1\n[aggregation]\nmin-cohort = 4\n[privacy]\ntotal-epsilon = 8.0\nunit = "image"\n'
    b'[vectors]\nsend = "never"\n'
)
HOSPITAL = b'version = 1\nname = "h"\n[data]\nfolder = "data"\n[classes]\n"a b" = "b"\n'


def _run_config(data: bytes) -> object:
    told = read_json_bytes(data)
    plain = {key.name: key.default for key in KEYS}
    return RunConfig.parse(plain | told if isinstance(told, dict) else plain)


read_json_bytes = in_file("any.json", read_json)


def _configurations() -> list[Target]:
    config = {"dataset": "synthetic", "rounds": 3, "epsilon": 6.0, "privacy": "local",
              "base": "", "secagg": True}  # fmt: skip
    item = {
        "serial": "a" * 32, "base": "b" * 64, "run": "r", "version": 0, "bucket": 1,
        "epsilon": 1.0, "created": "2026-01-01T00:00:00Z", "handed": ["r"],
        "receipts": {"r": "accepted"}, "withdrawn": False, "told": [],
    }  # fmt: skip
    return [
        Target("policy", in_file("policy.toml", HospitalPolicy.load), (POLICY,)),
        Target("hospital.toml", in_file("hospital.toml", HospitalFile.load), (HOSPITAL,)),
        Target("run config", _run_config, (json.dumps(config).encode(),)),
        Target("json file", read_json_bytes, (b'{"a": [1, 2.5, null, "x"]}',)),
        Target("outbox", in_file("outbox/one.json", lambda path: _states(Outbox(path.parent))),
               (json.dumps(item).encode(),)),
    ]  # fmt: skip


def _states(outbox: Outbox) -> list[str]:
    return [item.state for item in outbox.items()]


def _data_sets() -> list[Target]:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8))
    pictures = []
    for form in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"):
        out = io.BytesIO()
        picture.save(out, form)
        pictures.append(out.getvalue())
    deep = io.BytesIO()
    Image.fromarray(rng.integers(0, 65536, (8, 8)).astype(np.uint16)).save(deep, "PNG")
    arrays: dict[str, Any] = {"class_names": np.array(["a", "b"])}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(4)[:, None] % 2
        arrays[f"{split}_groups"] = np.arange(4)
    plain, deflated = io.BytesIO(), io.BytesIO()
    np.savez(plain, **arrays)
    np.savez_compressed(deflated, **arrays)

    def manifest(path: Path) -> Listing:
        (path.parent / "one.png").write_bytes(pictures[0])
        return list_manifest(path.parent, path, splits=False)

    return [
        Target("npz", in_file("x.npz", load_npz), (plain.getvalue(), deflated.getvalue())),
        Target("picture", in_file("x.png", lambda path: read_picture(path, 8)),
               (*pictures, deep.getvalue())),
        Target("manifest", in_file("table/manifest.csv", manifest),
               (b'file,label,patient\n"one.png",a,P1\n',
                b"\xef\xbb\xbffile;label\r\none.png;a\r\n")),
    ]  # fmt: skip


def _models() -> list[Target]:
    identity, base = Identity(bytes(range(32))), small_base()
    metrics = {"val-examples": 3.0, "val-correct": 1.0, "val-loss-sum": 2.0}
    vector = TaskVector(hospital="h", base="a" * 64, values={"a": np.ones((3, 3), np.float32)},
                        bucket=1, epsilon=1.0, delta=1e-4, metrics=metrics)  # fmt: skip
    network = {"stem.0.weight": np.zeros((4, 3, 3, 3), np.float32),
               "head.weight": np.zeros((8, 64), np.float32)}  # fmt: skip

    def model(path: Path) -> object:
        try:
            weights = load_tensors(path)
        except ValueError:  # which its callers turn into their own error
            return None
        return spec_of(weights)

    ensemble = {"version": 1, "run": "r", "base": "a" * 64, "base-version": 0,
                "model": {"model": "dpresnet"}, "classes": ["a", "b"], "members": []}  # fmt: skip
    return [
        Target("vector", SignedVector.from_bytes,
               (SignedVector.sign(vector, identity).to_bytes(),)),
        Target("withdrawal", Withdrawal.from_bytes,
               (Withdrawal.sign("h", "a" * 32, identity).to_bytes(),)),
        Target("base", Base.from_bytes, (base.to_bytes(),)),
        Target("model", in_file("model.safetensors", model), (save(network),)),
        Target("ensemble", in_file("ensemble.json", Manifest.read),
               (json.dumps(ensemble).encode(),), reads=False),
        Target("shipped app", shipped, (_app(),)),
    ]  # fmt: skip


def _app() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("common/a.py", "x = 1\n" * 20)
        made.writestr("client_app/b.py", "y")
    return out.getvalue()


def _ledgers() -> list[Target]:
    folder = place() / "hospital"
    folder.mkdir()
    path = folder / "ledger.sqlite"
    train(path)
    content = path.read_bytes()

    def opened(path: Path) -> None:
        for beside in path.parent.glob(f"{path.name}-*"):
            beside.unlink()
        with Ledger(path, create=False) as ledger:
            ledger.runs()

    return [
        Target("ledger", in_file("ledger/ledger.sqlite", opened), (content,)),
        Target("ledger export", in_file("export.json", verify_export), (exported_json(folder),)),
    ]


@cache
def targets() -> dict[str, Target]:
    """Every target by its name."""
    logging.disable(logging.CRITICAL)  # Pillow's and our own remarks on what is broken
    try:
        found = [
            *_secure_aggregation(), *_records(), *_enrolment(), *_configurations(),
            *_data_sets(), *_models(), *_ledgers(),
        ]  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    return {target.name: target for target in found}
