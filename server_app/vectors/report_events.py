"""What happened in a run of vectors: the lines of ``metrics.jsonl``, read in the order of time.

A line may be of another version, torn, or hostile: each value is taken for what it should be, or
for nothing. Lines that a resumed run made anew stand where they belong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from common.federation_file import TIME
from server_app.reporting.files import event_of
from server_app.reporting.formats import MISSING
from server_app.reporting.values import (
    Json,
    count,
    loss_of_privacy,
    mapping,
    names,
    number,
    objects,
    share,
    text,
)


@dataclass(frozen=True)
class Moment:
    """When: seconds since the run's first line (None: no line has a time), in words, and after
    how many arrivals."""

    seconds: float | None
    words: str
    arrivals: int


@dataclass(frozen=True)
class Arrival:
    """A vector that was accepted. ``images``: that many or more; ``late``: by so many bases.

    ``before``, ``after``: the hospital's own accuracy of the base and of what it made of it, as
    it told. ``validation``: of the candidate with this vector. ``fate``: if it counts no more.
    """

    at: Moment
    hospital: str
    serial: str
    version: int | None
    late: int
    norm: float | None
    images: int | None
    epsilon: float | None
    delta: float | None
    before: float | None
    after: float | None
    validation: float | None
    fate: str


@dataclass(frozen=True)
class Influence:
    """What a model loses without a hospital: ``moved`` below 0 means that it is better off."""

    hospital: str
    without: float | None
    moved: float | None
    harmful: bool


@dataclass(frozen=True)
class Influences:
    """Of all hospitals on one model, whose ``accuracy`` it is; the worst first."""

    accuracy: float | None
    margin: float | None
    rows: tuple[Influence, ...] = ()

    @property
    def harmful(self) -> list[str]:
        """The hospitals that harm."""
        return [row.hospital for row in self.rows if row.harmful]


@dataclass(frozen=True)
class Published:
    """A base that became current. ``test``: the figures as recorded, or empty.

    ``vectors`` is None where the line doesn't tell: of a base that was made anew of none, or, by
    an older version, made anew or by hand at all. ``judged``: whether anybody judged it before it
    was published; None where the line doesn't tell.
    """

    at: Moment
    version: int | None
    why: str
    hospitals: tuple[str, ...]
    vectors: int | None
    validation: float | None
    test: Json
    influences: Influences
    judged: bool | None

    @property
    def accuracy(self) -> float | None:
        """On the test images."""
        return share(self.test.get("accuracy"))


@dataclass(frozen=True)
class Held:
    """A candidate that was not published; ``version``: of the base that stayed.

    By public images: accuracies and a ``margin`` of one. By the hospitals: images that it
    ``gained`` and ``lost``, and a ``margin`` in images.
    """

    at: Moment
    version: int | None
    code: str
    current: float | None
    candidate: float | None
    margin: float | None
    gained: int | None
    lost: int | None
    influences: Influences

    @property
    def difference(self) -> float | None:
        """Candidate less current, if both were measured."""
        if self.current is None or self.candidate is None:
            return None
        return self.candidate - self.current


@dataclass(frozen=True)
class Setback:
    """A refusal (``kind``: ``refused`` by the server, ``refusal`` by the hospital), an exclusion
    (``excluded``) or a withdrawal (``withdrawal``). ``why``: a code, or the reason."""

    at: Moment
    kind: str
    hospital: str
    why: str
    serial: str


@dataclass(frozen=True)
class Ensemble:
    """What was left where nothing was merged: the hospitals' models, asked together.

    ``error``: why it could not be made; the rest is empty then.
    """

    why: str
    vectors: int
    hospitals: tuple[str, ...]
    validation: float | None
    accuracy: float | None
    macro_f1: float | None
    macro_auc: float | None
    error: str


@dataclass
class Story:
    """All of a run's lines, each kind in the order of time."""

    arrivals: list[Arrival] = field(default_factory=list)
    bases: list[Published] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    setbacks: list[Setback] = field(default_factory=list)
    ensemble: Ensemble | None = None
    """The last one that was made."""
    unknown: Counter[str] = field(default_factory=Counter)
    """Lines of events that this version doesn't know, by event."""
    begins: str = MISSING
    """The first line's time, in words."""
    spans: float | None = None
    """Seconds from the first line to the last."""


SETBACKS = ("refused", "refusal", "excluded", "withdrawal")


def read_story(lines: Sequence[Json]) -> Story:
    """The story that the lines tell; a line without a time belongs after the one before it."""
    story = Story()
    times = _times(lines)
    ordered = sorted(range(len(lines)), key=lambda i: times[i] or 0.0)  # stable
    known = [t for t in times if t is not None]
    begin = min(known, default=None)
    if begin is not None:
        story.begins, story.spans = _words(begin), max(known) - begin
    fates = _fates(lines)
    for i in ordered:
        line, time = lines[i], times[i]
        seconds = None if time is None or begin is None else time - begin
        seen = len(story.arrivals)
        at = Moment(seconds, MISSING if time is None else _words(time), seen)
        kind = event_of(line)
        if kind == "arrival":
            story.arrivals.append(_arrival(line, Moment(at.seconds, at.words, seen + 1), fates))
        elif kind == "base":
            story.bases.append(_base(line, at))
        elif kind == "held":
            story.held.append(_held(line, at))
        elif kind in SETBACKS:
            why = line.get("reason") if kind == "excluded" else line.get("code")
            serial = line.get("id") if kind == "refusal" else line.get("serial")
            story.setbacks.append(
                Setback(at, str(kind), text(line.get("hospital")), text(why), text(serial))
            )
        elif kind == "ensemble":
            story.ensemble = ensemble(line)
        else:
            story.unknown[text(kind)] += 1
    return story


def influences(value: object) -> Influences:
    """An influence table as the files keep it; an empty one where nothing was measured."""
    table = mapping(value)
    rows = [
        Influence(
            text(row.get("hospital")), share(row.get("without")), number(row.get("influence")),
            row.get("harmful") is True,
        )
        for row in objects(table.get("rows"))
    ]  # fmt: skip
    return Influences(share(table.get("accuracy")), number(table.get("margin")), tuple(rows))


def ensemble(told: Json) -> Ensemble:
    """An ensemble as a line or the summary tells of it."""
    error = told.get("error")
    return Ensemble(
        text(told.get("why")), count(told.get("vectors")) or 0,
        tuple(names(told.get("hospitals"))), share(told.get("validation")),
        share(told.get("test_accuracy")), number(told.get("test_macro_f1")),
        number(told.get("test_macro_auc")), text(error) if error else "",
    )  # fmt: skip


def _times(lines: Sequence[Json]) -> list[float | None]:
    """Seconds since 1970 of each line: its own, else that of the last line that has one."""
    found: list[float | None] = []
    for line in lines:
        time = _time(line.get("time"))
        found.append(time if time is not None or not found else found[-1])
    return found


def _time(value: object) -> float | None:
    try:
        return datetime.strptime(str(value), TIME).replace(tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):
        return None


def _words(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _fates(lines: Sequence[Json]) -> Mapping[str, str]:
    """Serial → what became of a vector after it was accepted."""
    words = {"excluded": "excluded", "withdrawal": "withdrawn"}
    return {
        text(line.get("serial")): words[kind]
        for line in lines
        if (kind := event_of(line)) in words and line.get("serial")
    }


def _arrival(line: Json, at: Moment, fates: Mapping[str, str]) -> Arrival:
    serial, metrics = text(line.get("serial")), mapping(line.get("metrics"))
    newer = "a newer one counts" if line.get("superseded") is True else ""
    return Arrival(
        at, text(line.get("hospital")), serial, count(line.get("version")),
        count(line.get("staleness")) or 0, number(line.get("norm")),
        count(line.get("bucket")), loss_of_privacy(line.get("epsilon")), share(line.get("delta")),
        _own(metrics, "val"), _own(metrics, "tuned"), share(line.get("validation")),
        fates.get(serial, newer),
    )  # fmt: skip


def _own(metrics: Json, of: str) -> float | None:
    """A hospital's accuracy; under privacy it has noise, and may be beyond what is possible."""
    correct, examples = number(metrics.get(f"{of}-correct")), number(metrics.get(f"{of}-examples"))
    if correct is None or examples is None or examples <= 0:
        return None
    return min(max(correct / examples, 0.0), 1.0)


def _base(line: Json, at: Moment) -> Published:
    version, vectors = count(line.get("version")), count(line.get("vectors"))
    return Published(
        at, version, text(line.get("why")),
        tuple(names(line.get("hospitals"))), vectors or (0 if version == 0 else None),
        share(line.get("validation")), mapping(line.get("test")),
        influences(line.get("influence")), _judged(line.get("gate")),
    )  # fmt: skip


def _judged(gate: object) -> bool | None:
    """By accuracies on public images, or by counts of the hospitals."""
    if not isinstance(gate, dict):
        return None
    return any(number(gate.get(name)) is not None for name in ("candidate", "gained"))


def _held(line: Json, at: Moment) -> Held:
    gate = mapping(line.get("gate"))
    return Held(
        at, count(line.get("version")), text(line.get("code")), share(gate.get("current")),
        share(gate.get("candidate")), number(gate.get("margin")),
        count(gate.get("gained")), count(gate.get("lost")),
        influences(line.get("influence")),
    )  # fmt: skip
