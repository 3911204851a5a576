"""The tables on the terminal, and what was aimed at beside what came out."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.secagg.figures import Row


def show(rows: Sequence[Row], masks: Row | None, console: Console) -> None:
    """The tables, and what was aimed at beside what came out."""
    cpu = Table(title="CPU seconds of a round (ours / stock)")
    traffic = Table(title="Bytes per hospital (ours / stock), and the mean's largest error")
    for table, columns in (
        (cpu, ("total", "ratio", "w/o FedAvg", "per hospital", "server", "repeats")),
        (traffic, ("MB up", "ratio", "kB down", "max error / range")),
    ):
        for column in ("hospitals", "dropped", *columns):
            table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        head = [str(row["hospitals"]), str(row["dropouts"])]
        cpu.add_row(
            *head,
            _pair(row, "cpu_s", "{:.2f}"),
            _number(row["ratio_cpu"], "{:.3f}"),
            _number(row["ratio_cpu_without_fedavg"], "{:.3f}"),
            _pair(row, "hospital_cpu_s", "{:.3f}"),
            _pair(row, "server_cpu_s", "{:.2f}"),
            str(row["repeats"]),
        )
        traffic.add_row(
            *head,
            _pair(row, "bytes_up", "{:.3f}", 1e-6),
            _number(row["ratio_bytes_up"], "{:.4f}"),
            _pair(row, "bytes_down", "{:.1f}", 1e-3),
            f"{_number(row['max_error'], '{:.1e}')} / {_number(row['stock_max_error'], '{:.1e}')}",
        )
    console.print(cpu)
    console.print(traffic)
    if masks is not None:
        single = Table(title=f"One mask, one encoding ({masks['parameters']:,} parameters)")
        for column in ("", "ours ms", "stock ms", "ours GB/s", "stock GB/s"):
            single.add_column(column, justify="right")
        for what, mine, theirs in (
            ("mask, made and added", "mask", "stock_mask"),
            ("generator alone", "stream", "stock_generator"),
            ("encoding", "encode", "stock_encode"),
        ):
            single.add_row(
                what,
                *(_number(masks[f"{task}_ms"], "{:.1f}") for task in (mine, theirs)),
                *(_number(masks.get(f"{task}_gb_per_s"), "{:.2f}") for task in (mine, theirs)),
            )
        console.print(single)
    for line in targets(rows, masks):
        console.print(line)


def targets(rows: Sequence[Row], masks: Row | None) -> list[str]:
    """One line for each target that these rows can speak about: met or missed, with figures."""
    lines = []
    for row in rows:
        if row["error"] is not None:
            lines.append(f"{row['hospitals']} hospitals, {row['dropouts']} dropped: {row['error']}")
            continue
        where = f"{row['hospitals']} hospitals, {row['dropouts']} dropped"
        if row["hospitals"] == 20:
            lines.append(_target(f"CPU at {where}", row["ratio_cpu"], 1 / 3))
        lines.append(_target(f"bytes up at {where}", row["ratio_bytes_up"], 0.55))
    whole = [row for row in rows if row["error"] is None and row["dropouts"] == 0]
    if len(whole) > 1:
        first, last = min(whole, key=_size), max(whole, key=_size)
        growth = last["ours_hospital_cpu_s"] / first["ours_hospital_cpu_s"]
        lines.append(
            f"a hospital's CPU with {last['hospitals']} hospitals is {growth:.2f} of that with "
            f"{first['hospitals']}, whose number of neighbours is the same"
        )
    if masks is not None:
        speed = masks["mask_gb_per_s"]
        lines.append(f"mask: {speed:.2f} GB/s, at least 1: {'met' if speed >= 1 else 'MISSED'}")
    return lines


def _size(row: Row) -> int:
    return int(row["hospitals"])


def _target(what: str, ratio: float, most: float) -> str:
    return f"{what}: {ratio:.3f} of stock's, at most {most:.3f}: " + (
        "met" if ratio <= most else "MISSED"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _pair(row: Row, key: str, form: str, scale: float = 1.0) -> str:
    values = (row[f"ours_{key}"], row[f"stock_{key}"])
    return " / ".join(_number(None if v is None else v * scale, form) for v in values)
