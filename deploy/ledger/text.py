"""The document of :mod:`deploy.ledger.view` as text, for a person: three tables and remarks."""

from __future__ import annotations

import json
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from deploy.ledger.view import Document


def render(document: Document, *, width: int | None = None) -> None:
    """Print :func:`~deploy.ledger.view.describe`'s document.

    ``width``: in columns, by default the terminal's. Nothing is said by colour, and nothing in the
    ledger is read as markup.
    """
    console = Console(width=width, highlight=False, markup=False, emoji=False, color_system=None)
    ledger, policy, unit = document["ledger"], document["policy"], document["policy"]["unit"]
    name = f" ({ledger['hospital']})" if ledger["hospital"] else ""
    print(f"ledger: {ledger['path']}{name}")
    print(f"        {ledger['entries']} entries, head {ledger['head'][:16]}… (`consilium ledger "
          "verify` prints it)")  # fmt: skip
    if policy["path"] is None:
        print(f"policy: no policy: no limit. Figures at δ={policy['total_delta']:g}")
    else:
        total = "no limit" if policy["total_epsilon"] == "inf" else f"{policy['total_epsilon']:g}"
        print(f"policy: {policy['path']}")
        print(f"        total ε of any {unit}: {total}, at δ={policy['total_delta']:g}; an "
              f"unfinished run holds its rest for {policy['hold_days']:g} days")  # fmt: skip
    if others := len(ledger["other_ledgers"]):
        print(f"note:   not counted here: {others} other ledger(s) of this hospital; see --run")
    console.print(_data_set_table(document["data_sets"], unit))
    print("prv, pld, rdp: accountants of a single run; renyi-filter: of runs one after another\n")
    console.print(_run_table(document["runs"]))
    if "entries" in document:
        console.print(_entry_table(document["entries"]))
    for line in _remarks(document):
        console.print(line)


def _table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="", header_style="")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _data_set_table(rows: list[Document], unit: str) -> Table:
    table = _table(
        f"Data sets, and since when: ε of the worst-off {unit}, over all runs",
        "data set", "images", "also in", "ε spent", "in the runs", "ε held", "ε left",
        right=("images", "ε held", "ε left"),
    )  # fmt: skip
    for row in rows:
        spent = row["spent"]
        table.add_row(
            f"{row['data_set'][:8]}\n{row['since'][:10]}",
            str(row["images"]),
            "\n".join(f"{o['data_set'][:8]}: {o['images']}" for o in row["overlaps"]) or "-",
            f"{_epsilon(spent['epsilon'])}\n{spent['accountant']}",
            "\n".join(spent["runs"]) or "-",
            _epsilon(row["held_epsilon"]),
            "no limit" if row["left_epsilon"] == "inf" else _epsilon(row["left_epsilon"]),
        )
    return table


def _run_table(rows: list[Document]) -> Table:
    table = _table("Runs", "run, data set, unit", "mechanism", "rounds", "ε spent", "last", "state")
    for row in rows:
        spent, promise, mechanism = row["spent"], row["promise"], row["mechanism"]
        epsilon, noise, rounds = [_epsilon(spent["epsilon"])], ["no noise"], "-"
        if promise is not None:
            epsilon = [f"{epsilon[0]} of {promise['epsilon']:g}",
                       f"prv {_epsilon(spent['prv'])}", f"pld {_epsilon(spent['pld'])}",
                       f"δ={promise['delta']:g}"]  # fmt: skip
            noise = [f"σ={mechanism['noise_multiplier']:.4g}",
                     f"q={mechanism['sampling_rate']:.4g}",
                     f"{mechanism['steps_per_round']} steps/round"]  # fmt: skip
            rounds = f"{row['rounds_used']} of {row['rounds_planned']}"
        state = [row["state"]]
        if row["hold_until"]:
            state += ["holds until", row["hold_until"][:10]]
        if row["unsettled"]:
            state.append(f"{len(row['unsettled'])} unsettled")
        whose = [row["run"], *(name[:8] for name in row["data_sets"]), row["unit"]]
        last = [row["last"][:10], row["last"][11:16] + " UTC"]
        cells = (whose, noise, [rounds], epsilon, last, state)
        table.add_row(*("\n".join(lines) for lines in cells))
    return table


def _entry_table(rows: list[Document]) -> Table:
    table = _table("Entries", "#", "time (UTC)", "kind", "what", "hash", right=("#",))
    for row in rows:
        told = {
            "run": row["run"], "data set": row["dataset"][:8], "round": row["round"],
            "part": row["part"], "mechanism": row["mechanism"], "unit": row["unit"],
            "σ": row["noise_multiplier"], "q": row["sampling_rate"], "steps": row["steps"],
            "pure ε": row["pure_epsilon"], "promise": _promise(row), "model": row["model"][:8],
            "of entry": row["refers"],
        }  # fmt: skip
        what = ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in told.items()
            if value not in ("", None)
        )
        time = row["time"][:19].replace("T", " ")
        table.add_row(str(row["seq"]), time, row["kind"], what, row["hash"][:8])
    return table


def _promise(row: Document) -> str:
    if row["kind"] != "plan":
        return ""
    promise = json.loads(row["note"])["plan"]["promise"]
    return f"ε={promise['epsilon']:g} δ={promise['delta']:g}"


def _remarks(document: Document) -> Iterable[str]:
    for row in document["data_sets"]:
        if row["over"]:
            yield f"! data set {row['data_set'][:8]} has spent or holds more than the policy allows"
    for row in document["runs"]:
        if row["unsettled"]:
            rounds = sorted({str(u["round"]) for u in row["unsettled"]})
            yield (
                f"! run {row['run']}: reserved and not settled in round {', '.join(rounds)}: a "
                "crash, or a round at work now; it counts as spent"
            )
        if not row["spent"]["agree"]:
            yield f"! run {row['run']}: the accountants differ by more than 2 %; the larger counts"
        if row["state"] == "not private":
            yield f"! run {row['run']} was trained without privacy: its ε is infinite"


def _epsilon(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.3f}"
