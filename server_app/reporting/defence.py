"""What the defence did in a fedavg run: who is named, and what was set aside or rolled back."""

from __future__ import annotations

from collections.abc import Sequence

from server_app.reporting.files import round_of
from server_app.reporting.values import Json, count, mapping, names, number, objects, text


def defence(summary: Json, records: Sequence[Json]) -> Json:
    """``named`` (hospital, why), ``suspected`` names, ``events``, and ``watched``: if it was on."""
    found = mapping(summary.get("defence"))
    events = [event for record in records for event in _events(record)]
    return {
        "watched": isinstance(summary.get("defence"), dict) or bool(events),
        "named": [(text(name), text(why)) for name, why in mapping(found.get("named")).items()],
        "suspected": names(found.get("suspected")),
        "events": events,
        "in_halves": sum(isinstance(record.get("halves"), list) for record in records),
    }


def _events(record: Json) -> list[Json]:
    told, round_ = mapping(record.get("defence")), round_of(record)
    rows = [
        {"round": round_, "what": "sum set aside", "whom": ", ".join(names(one.get("members"))),
         "why": text(one.get("why"))}
        for one in objects(told.get("set_aside"))
    ]  # fmt: skip
    back = mapping(told.get("rolled_back"))
    if back:
        step = number(back.get("step")) or 0.0
        what = f"rolled back; {100 * step:.3g} % of the step instead" if step else "rolled back"
        rows.append({"round": count(back.get("round")), "what": what, "whom": "the model",
                     "why": text(back.get("why"))})  # fmt: skip
    rows += [
        {"round": round_, "what": "weight lowered", "whom": text(name), "why": text(why)}
        for name, why in mapping(told.get("lowered")).items()
    ]
    rows += [
        {"round": round_, "what": "named", "whom": name, "why": "left out from the next round on"}
        for name in names(told.get("named"))
    ]
    return rows
