"""The egress log: every field that leaves a hospital, listed before it leaves.

``egress.tsv`` in the hospital's directory has one line a field, for people and for spreadsheets:
when, for which run and round, in which message, what, how much of it, and how it is protected. A
reply with a record or a field that is not in the tables below does not leave at all, and neither
does one that could not be logged.

A server can ask, and be refused, as often as it likes; so the log has limits (the policy's table
``[egress]``), and none of them loses what left. A file that is full is compressed and put beside
(``egress-NUMBER.tsv.gz``, the higher the later). Of answers that carry nothing of the data (a
greeting, a refusal, the end of a round) only the first of each kind and day are listed, and the
others counted, in ``egress-counts.json``. Where all files together reach the limit nothing leaves
any more, until somebody has put the older ones elsewhere.

What the log does not hold: the values themselves, and what Flower adds to a message (the node's
number, times, sizes).
"""

from __future__ import annotations

import fcntl
import gzip
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from flwr.app import Array, ArrayRecord, RecordDict

from client_app.hospital import Hospital
from client_app.policy import Egress
from common.aggregation import GRADIENT
from common.errors import ConsiliumError
from common.files import atomic_write, read_json, write_json
from common.messages import Comparison, Job, Offer, Receipt
from common.privacy.limits import EXACT, NOISED
from common.secagg import RoundBinding
from common.vectors import SignedVector, Withdrawal
from common.vectors.vector import FIELDS

FILE = "egress.tsv"
COUNTS = "egress-counts.json"
_OLDER = re.compile(r"egress-([0-9]{6})\.tsv\.gz")
_DAYS = 400
"""For which answers are counted by the day; those before are added up."""
HEADER = ("time", "run", "round", "message", "field", "amount", "protection")


class EgressError(ConsiliumError):
    """Something would have left that the egress log does not know, or could not note."""

    code = "egress"


CLEAR = "in the clear"
_ENVELOPE = {
    "keys": "public keys made for this round, signed; nothing of the data",
    "share": "shares of this round's secrets, encrypted for neighbouring hospitals",
    "consistency": "a signature of who is still in the round",
    "unmask": "one share for each neighbour: together they open the sum, and nothing else",
    "close": "nothing",
}
_KNOWN = {
    "greeting": {
        "hospital": "the hospital's name, in the clear",
        "package": "which version of consilium it runs, in the clear",
        "oldest": "the oldest wire version that it reads, in the clear",
        "proof": "the hospital's signature that it is this one; nothing of the data",
    },
    "refusal": {
        "code": "why the hospital refused, as a word, in the clear",
        "correlation-id": "under which the hospital's own log has the details, in the clear",
    },
    "report": {"hospital": "the hospital's name, in the clear"},
    "delivery": {
        "hospital": "the hospital's name, in the clear",
        "key": "the hospital's public identity key; nothing of the data",
    },
}
"""Record → field → protection. ``run`` and ``round`` repeat what the server sent; ``version`` and
``minor`` are those of the wire format."""
_ECHOED = {"version", "minor", "run", "round"}
_METRICS = {"examples", "train-loss-sum", "val-examples", "val-correct", "val-loss-sum"}
_VECTOR = {
    "hospital": "the hospital's name, in the clear",
    "base": "the id of the base that was sent; nothing of the data",
    "serial": "a random number; nothing of the data",
    "created": "when it was made, in the clear",
    "epsilon": "what the vector cost, in the clear",
    "delta": "what the vector cost, in the clear",
}
"""Field of a task vector → protection, where it is not that of figures."""
_VECTOR_METRICS = {
    f"{of}-{name}" for of in ("val", "tuned") for name in ("examples", "correct", "loss-sum")
}


@dataclass(frozen=True)
class Field:
    """One thing that leaves: its name, how much of it, how it is protected."""

    name: str
    amount: str
    protection: str


def fields_of(
    record: RecordDict, stage: str, hospital: Hospital | None, binding: RoundBinding | None
) -> list[Field]:
    """Everything in ``record``, a reply of ``stage``; EgressError for what is not known.

    ``binding``: of the round at hand, whose layout says what is inside a masked vector.
    """
    found: list[Field] = []
    for name, inner in record.items():
        if name == "envelope":
            _only(name, set(inner), {"version", "minor", "payload"})
            if "payload" in inner:
                small = inner["payload"]
                assert isinstance(small, bytes)
                found += _payload(small, stage, hospital, binding)
        elif name in _KNOWN:
            _only(name, set(inner), set(_KNOWN[name]) | _ECHOED)
            found += [
                Field(f"{name}.{key}", _shown(inner[key]), text)
                for key, text in _KNOWN[name].items()
                if key in inner
            ]
        elif name == "parcel":
            found += _parcel(inner, hospital)
        elif name == "payload":
            _only(name, set(inner), {"bytes"})
            array = inner["bytes"]
            assert isinstance(array, Array)
            found += _payload(array.data, stage, hospital, binding)
        elif name == "metrics":
            _only(name, set(inner), _METRICS)
            found += [Field(key, "1 number", _told(key, hospital, None)) for key in inner]
        elif name == "update":
            assert isinstance(inner, ArrayRecord)
            size = sum(math.prod(array.shape) for array in inner.values())
            found.append(Field("update", f"{size} numbers", _told("update", hospital, None)))
        else:
            raise EgressError(
                f"a reply has the record '{name}', which the egress log does not know",
                "nothing was sent; add it to client_app/egress.py with its protection",
            )
    return found


def note(
    home: Path,
    record: RecordDict,
    *,
    stage: str,
    hospital: Hospital | None = None,
    job: Job | Offer | Receipt | Comparison | RoundBinding | None = None,
    binding: RoundBinding | None = None,
) -> None:
    """Append what ``record`` holds to the log in ``home``, flushed to the disk.

    Raises EgressError where a field is unknown or the log cannot be written: then nothing may
    leave.
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    limits = hospital.policy.egress if hospital is not None else Egress()
    run, number = (job.run, str(job.round)) if job is not None else ("", "")
    fields = fields_of(record, stage, hospital, binding)
    lines = [
        (now, run, number, stage, field.name, field.amount, field.protection) for field in fields
    ]
    path = home / FILE
    try:
        with _alone(path):
            _check_room(path, limits)
            kind = _kind(stage, fields)
            if kind and _count(path, kind, now) > limits.listed_a_day:
                return
            _append(path, lines)
            if path.stat().st_size > limits.rotate_mb * 1_000_000:
                _put_beside(path)
    except OSError as error:
        raise EgressError(
            f"the egress log {path} cannot be written ({error.strerror or error})",
            "nothing was sent; make room on the disk, or correct the folder's permissions",
        ) from None


def files(path: Path) -> list[Path]:
    """The log's files in their order, the oldest first; ``path``: that of the newest."""
    older = sorted(p for p in path.parent.glob("egress-*.tsv.gz") if _OLDER.fullmatch(p.name))
    return [*older, path] if path.exists() or not older else older


def read(path: Path) -> Iterator[dict[str, str]]:
    """The log's lines as dictionaries, of all its files; EgressError for a file that is none."""
    for file in files(path):
        try:
            content = gzip.decompress(file.read_bytes()) if file != path else file.read_bytes()
            lines = content.decode().split("\n")
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise EgressError(
                f"the egress log {file} cannot be read: {error}", "check the path"
            ) from None
        if tuple(lines[0].split("\t")) != HEADER:
            raise EgressError(f"{file} is no egress log", "check the path")
        for line in filter(None, lines[1:]):
            yield dict(zip(HEADER, line.split("\t"), strict=False))


def counts(path: Path) -> dict[str, dict[str, int]]:
    """Day (``before`` for those long ago) → kind of answer → how many; see the module's text."""
    told = read_json(path.with_name(COUNTS)) if path.with_name(COUNTS).exists() else {}
    try:
        return {str(day): {str(k): int(n) for k, n in of.items()} for day, of in told.items()}
    except (AttributeError, TypeError, ValueError):
        raise EgressError(
            f"{path.with_name(COUNTS)} is malformed", "move it away: counting begins again"
        ) from None


def _kind(stage: str, fields: Sequence[Field]) -> str:
    """Of an answer without anything of the data: message and what it says; "" for any other."""
    names = {field.name for field in fields}
    if "refusal.code" in names:
        code = next(field.amount for field in fields if field.name == "refusal.code")
        return f"{stage}: refused, {code}"
    greeting = bool(names) and all(name.startswith("greeting.") for name in names)
    return stage if stage == "close" or greeting else ""


def _count(path: Path, kind: str, now: str) -> int:
    """How many of the kind there have been today, this one with them."""
    known, today = counts(path), now[:10]
    for day in sorted(known)[:-_DAYS] if len(known) > _DAYS else ():
        if day != "before":
            gone, before = known.pop(day), known.setdefault("before", {})
            for name, number in gone.items():
                before[name] = before.get(name, 0) + number
    of_today = known.setdefault(today, {})
    of_today[kind] = of_today.get(kind, 0) + 1
    write_json(path.with_name(COUNTS), known, mode=0o600)
    return of_today[kind]


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """With no other process at the log."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = os.open(path.with_name(".egress.lock"), os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _append(path: Path, lines: Iterable[tuple[str, ...]]) -> None:
    text = "".join("\t".join(_plain(cell) for cell in line) + "\n" for line in lines)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        if os.fstat(fd).st_size == 0:
            text = "\t".join(HEADER) + "\n" + text
        os.write(fd, text.encode())  # one write: lines of two processes do not mix
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_room(path: Path, limits: Egress) -> None:
    """EgressError where all files together are too large."""
    whole = sum(file.stat().st_size for file in files(path) if file.exists())
    if whole > limits.max_mb * 1_000_000:
        raise EgressError(
            f"the egress log in {path.parent} has more than {limits.max_mb} MB",
            "nothing was sent; keep the older files elsewhere (egress-*.tsv.gz), find out why it "
            "grew, or raise max-mb under [egress] in the policy",
        )


def _put_beside(path: Path) -> None:
    """Compress the file, so that the next line begins another one."""
    numbers = [int(found.group(1)) for f in files(path) if (found := _OLDER.fullmatch(f.name))]
    packed = path.with_name(f"egress-{max(numbers, default=0) + 1:06d}.tsv.gz")
    # It is whole on the disk before the plain one goes. A kill in between leaves both: lines that
    # stand twice, and none that is lost.
    atomic_write(packed, gzip.compress(path.read_bytes(), 6), mode=0o600)
    path.unlink()


def _plain(cell: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in cell)


def _only(record: str, found: set[str], known: set[str]) -> None:
    if extra := sorted(found - known):
        raise EgressError(
            f"a reply's record '{record}' has the field '{extra[0]}', which the egress log does "
            "not know",
            "nothing was sent; add it to client_app/egress.py with its protection",
        )


def _payload(
    payload: bytes, stage: str, hospital: Hospital | None, binding: RoundBinding | None
) -> list[Field]:
    size = f"{len(payload)} bytes"
    if stage != "masked":
        what = {"train": "keys", "evaluate": "keys", "judge": "keys"}.get(stage, stage)
        if what not in _ENVELOPE:
            raise EgressError(f"there is no stage '{stage}' in the egress log", "add it there")
        return [Field(what, size, _ENVELOPE[what])]
    if binding is None:
        raise EgressError("a masked vector would leave whose contents are not known", "report it")
    inside = [
        Field(s.name, f"{s.length} number{'s' * (s.length > 1)}", _told(s.name, hospital, binding))
        for s in binding.layout.segments
    ]
    return [Field("masked", size, "the vector whose parts follow, masked"), *inside]


def _parcel(parcel: object, hospital: Hospital | None) -> list[Field]:
    """A task vector with each of its fields, and withdrawals; the bytes are read strictly."""
    assert isinstance(parcel, ArrayRecord)
    found = []
    for name, array in parcel.items():
        if name.startswith("withdrawal-"):
            serial = Withdrawal.from_bytes(array.data).serial
            found.append(Field("withdrawal", serial, "signed; nothing of the data"))
            continue
        _only("parcel", {name}, {"vector"})
        v = SignedVector.from_bytes(array.data).vector
        _only("vector", set(v.metrics), _VECTOR_METRICS)
        if v.epsilon is None or v.delta is None:
            how = f"{CLEAR}; exact, no differential privacy"
        else:
            unit = hospital.config.privacy_unit if hospital else "unit"
            how = f"{CLEAR}; with noise: ε={v.epsilon:.4g}, δ={v.delta:g} per {unit}, this vector"
        size = sum(math.prod(shape) for shape in v.shapes().values())
        found.append(Field("vector", f"{size} numbers", how))
        for part in FIELDS:
            if part != "metrics":
                protection = _VECTOR.get(part, how)
                found.append(Field(f"vector.{part}", str(getattr(v, part)), protection))
        found += [Field(f"vector.{key}", "1 number", how) for key in sorted(v.metrics)]
        found.append(Field("vector.signature", "64 bytes", "the hospital's signature"))
    return found


def _shown(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def _told(name: str, hospital: Hospital | None, binding: RoundBinding | None) -> str:
    """How one figure of a report, or of a masked vector, is protected."""
    if binding is not None:
        how = f"masked: only the sum over {binding.params.min_cohort} or more hospitals is opened"
    else:
        how = CLEAR
    if hospital is None:
        return how
    c = hospital.config
    metrics = hospital.policy.privacy.metrics if c.privacy != "none" else ""
    exact = metrics == EXACT and binding is not None
    if name.startswith("val-") and metrics and metrics != NOISED and not exact:
        return f"{how}; withheld: zero, whatever the images are"
    if c.privacy == "none" or (exact and name.startswith("val-")):
        return f"{how}; exact, no differential privacy"
    if name == GRADIENT and c.privacy == "distributed":
        return (
            f"{how}; with this hospital's share of the noise: ε={c.epsilon:g}, δ={c.delta:g} per "
            f"{c.privacy_unit}, whole run, of the sum alone"
        )
    return f"{how}; with noise: ε={c.epsilon:g}, δ={c.delta:g} per {c.privacy_unit}, whole run"
