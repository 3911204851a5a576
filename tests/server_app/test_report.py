"""Properties of the run report. ``make_sample_run`` leaves a plausible run to look at."""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import escape

from common.errors import DataError
from server_app import charts
from server_app.report import INPUTS, write_report
from tests.server_app.running import HOSTILE

CLASSES = (
    "basophil", "eosinophil", "erythroblast", "immature granulocyte",
    "lymphocyte", "monocyte", "neutrophil", "platelet",
)  # fmt: skip
TOWNS = (
    "Aachen", "Bergen", "Coimbra", "Debrecen", "Esbjerg",
    "Freiburg", "Groningen", "Helsinki", "Innsbruck", "Jena",
)  # fmt: skip
Files = dict[str, Any]


def make_sample_run(path: Path, *, private: bool = True, rounds: int = 10) -> Files:
    """Write a made-up run of ten hospitals and eight classes; return what it wrote."""
    rng = np.random.default_rng(7)
    names = [f"{town} University Hospital" for town in TOWNS]
    sizes = rng.dirichlet(np.full(10, 3.0)) * 11959
    labels = [rng.multinomial(int(size), rng.dirichlet(np.full(8, 1.2))) for size in sizes]
    totals = [int(counts.sum()) for counts in labels]
    partition = {
        "scheme": "Dirichlet label skew, alpha 1.2",
        "source": {"name": "bloodmnist", "source": "MedMNIST v2 file", "sha256": "ab" * 32},
        "classes": list(CLASSES),
        "hospitals": [
            {"name": name, "train": total * 9 // 10, "val": total - total * 9 // 10,
             "labels": counts.tolist()}
            for name, total, counts in zip(names, totals, labels, strict=True)
        ],
    }  # fmt: skip
    supports = (244, 624, 311, 579, 243, 284, 666, 470)
    metrics = []
    for number in range(rounds + 1):
        skill = 0.12 + 0.74 * (1 - np.exp(-number / 2.6)) - 0.01 * (number == rounds)
        failed, late = number == 6, number == 3
        dropped = [{"hospital": names[4], "stage": "train", "reason": "no reply in time"}]
        lost = {"stage": "unmask", "reason": "connection lost"}
        dropped += [{"hospital": name, **lost} for name in names[5:9]]
        dropped = dropped if failed else dropped[:1] if late else []
        gone = {drop["hospital"] for drop in dropped}
        sums = {"accuracy": float(skill) - 0.02, "loss": 2.2 - 1.7 * skill, "examples": 1200}
        metrics.append({
            "round": number, "status": "failed" if failed else "ok",
            "test": None if failed else _test_scores(rng, float(skill), supports),
            "train": {"loss": 2.1 - 1.6 * skill, "examples": 10700} if number else None,
            "validation": None if failed or not number else sums,
            "epsilon": 7.9312 * (number / rounds) ** 0.6 if private and number else None,
            **(_accountants(names, number / rounds) if private and number else {}),
            "expected": names if number else [],
            "contributed": [n for n in names if n not in gone] if number else [],
            "dropped": dropped, "seconds": 41.2 + number if number else 3.4,
        })  # fmt: skip
    best = metrics[rounds - 1]
    assert isinstance(best["test"], dict)
    summary = {
        "status": "completed", "rounds": rounds, "best_round": rounds - 1,
        **{f"test_{key}": best["test"][key] for key in ("accuracy", "macro_f1", "macro_auc")},
        "epsilon": 7.9312 if private else None, "delta": 1e-5 if private else None,
        "privacy": "local" if private else "none", "secagg": True,
        "source": "bloodmnist", "source_sha256": "ab" * 32,
        "versions": {"consilium": "0.1.0", "flwr": "1.41.0", "torch": "2.9.1", "opacus": "1.6.0"},
        "wall_seconds": 512.4, "reason": None,
    }  # fmt: skip
    config = {
        "mode": "fedavg", "rounds": rounds, "privacy": summary["privacy"],
        "epsilon": 8.0, "delta": 1e-5, "max-grad-norm": 1.0, "batch-size": 256,
        "learning-rate": 0.5, "partition": "dirichlet", "secagg": True,
    }  # fmt: skip
    contents = (config, partition, metrics, summary)
    files: Files = dict(zip(INPUTS, contents, strict=True))
    write_files(path, files)
    return files


def _accountants(names: list[str], done: float) -> dict[str, Any]:
    spent = {name: 7.9312 * done**0.6 * (1 - 0.02 * i) for i, name in enumerate(names)}
    both = {name: {"epsilon": e, "prv": e, "pld": e * 0.998} for name, e in spent.items()}
    return {"epsilon_by_hospital": both}


def _test_scores(rng: np.random.Generator, skill: float, supports: tuple[int, ...]) -> Files:
    confusion = []
    for index, support in enumerate(supports):
        weights = rng.dirichlet(np.full(8, 0.5)) * (1 - skill)
        weights[index] += skill
        confusion.append(rng.multinomial(support, weights / weights.sum()).tolist())
    matrix = np.array(confusion)
    recall = matrix.diagonal() / matrix.sum(axis=1)
    precision = matrix.diagonal() / np.maximum(matrix.sum(axis=0), 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    auc = 0.5 + skill * 0.55
    return {
        "accuracy": float(matrix.trace() / matrix.sum()),
        "macro_f1": float(f1.mean()),
        "macro_auc": auc,
        "loss": 2.15 - 1.65 * skill,
        "per_class": [
            {"name": name, "precision": float(p), "recall": float(r), "f1": float(f), "auc": auc,
             "support": s}
            for name, p, r, f, s in zip(CLASSES, precision, recall, f1, supports, strict=True)
        ],
        "confusion": confusion,
    }  # fmt: skip


def write_files(path: Path, files: Files) -> None:
    """Write the files of a run directory."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        lines = content if name.endswith(".jsonl") else [content]
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def page(run_dir: Path) -> str:
    """Write the report and return it."""
    return write_report(run_dir).read_text("utf-8")


def words(run_dir: Path) -> str:
    """Return what a reader sees, without the tags."""
    plain = re.sub(r"<style>.*?</style>|<[^>]*>", " ", page(run_dir), flags=re.S)
    return " ".join(html.unescape(plain).split())


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Files]:
    """Return a private run's directory and what its files hold."""
    path = tmp_path_factory.mktemp("runs") / "sample"
    return path, make_sample_run(path)


def test_the_page_refers_to_nothing_outside_itself(sample: tuple[Path, Files]) -> None:
    """A report opened at a hospital must not call anywhere."""
    found = page(sample[0])
    assert "http://" not in found and "https://" not in found
    assert not re.search(r"<(script|iframe|img|object|embed|base|form)\b|@import", found)
    for target in re.findall(r'(?:src|href)="([^"]*)"', found):
        assert target.startswith(("#", "data:"))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", found))
    assert "default-src 'none'" in found


def test_ids_are_unique_and_references_have_targets(sample: tuple[Path, Files]) -> None:
    """Several drawings share one page."""
    found = page(sample[0])
    ids = re.findall(r'\bid="([^"]*)"', found)
    assert found.count("<svg") == 5
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', found)) <= set(ids)


def test_every_drawing_has_words_and_every_table_a_caption(sample: tuple[Path, Files]) -> None:
    """A reader who doesn't see the charts gets their content."""
    found = page(sample[0])
    assert all('role="img" aria-label="' in tag for tag in re.findall(r"<svg[^>]*>", found))
    assert found.count("<caption>") == found.count("<table")


def test_figures_shown_equal_those_in_the_files(sample: tuple[Path, Files]) -> None:
    """Nothing is rounded in the model's favour, nothing recomputed."""
    path, files = sample
    seen, summary = words(path), files["summary.json"]
    assert f"{100 * summary['test_accuracy']:.2f}%" in seen
    assert f"Macro-F1 {summary['test_macro_f1']:.3f}" in seen
    assert f"Macro-AUC {summary['test_macro_auc']:.3f}" in seen
    assert "ε = 7.94 δ = 1 · 10⁻⁵" in seen  # 7.9312, rounded up
    assert "8 min 32 s" in seen and "3,421 test images" in seen
    assert "6 drop-outs" in seen and "9 completed, 1 failed; best: round 9" in seen
    for record in files["metrics.jsonl"]:
        if record["test"]:
            assert f"{100 * record['test']['accuracy']:.2f}%" in seen
    for row in files["metrics.jsonl"][9]["test"]["per_class"]:
        line = f"{row['name']} {row['precision']:.3f} {row['recall']:.3f} {row['f1']:.3f}"
        assert line in seen
    for hospital in files["partition.json"]["hospitals"]:
        assert f"{hospital['name']} {hospital['train']:,} {hospital['val']:,}" in seen
    for key, value in files["config.json"].items():
        assert f"{key} {'yes' if value is True else value}" in seen
    for name, version in summary["versions"].items():
        assert f"{name} {version}" in seen


def test_a_private_run_says_what_epsilon_is_for(sample: tuple[Path, Files]) -> None:
    """The bound, whom it covers, the target and both accountants are there."""
    seen = words(sample[0])
    assert "For the whole training, per image, at each hospital" in seen
    assert "target ε = 8" in seen and "by PRV" in seen
    assert "No differential privacy" not in seen


def test_a_run_without_privacy_says_so_loudly(tmp_path: Path) -> None:
    """No ε is shown where none was kept."""
    make_sample_run(tmp_path, private=False)
    seen = words(tmp_path)
    assert seen.count("No differential privacy in this run") == 2
    assert "ε =" not in seen and "Privacy loss so far" not in seen


def test_an_infinite_epsilon_is_no_privacy(tmp_path: Path) -> None:
    """A declaration doesn't outweigh the accountant."""
    write_files(tmp_path, {"summary.json": {"privacy": "local", "epsilon": float("inf")}})
    assert "No differential privacy in this run" in words(tmp_path)


def test_the_largest_epsilon_on_record_is_shown(tmp_path: Path) -> None:
    """One hospital that spent more than the summary says decides."""
    record = {"round": 1, "epsilon_by_hospital": {"A": {"epsilon": 3.0, "prv": 3.0, "pld": 3.5}}}
    summary = {"privacy": "local", "epsilon": 2.0}
    write_files(tmp_path, {"summary.json": summary, "metrics.jsonl": [record]})
    assert "ε = 3.50" in words(tmp_path)


def test_synthetic_data_is_said_loudly(tmp_path: Path) -> None:
    """Nobody may mistake generated images for patients'."""
    files = make_sample_run(tmp_path)
    write_files(tmp_path, {"summary.json": files["summary.json"] | {"source": "synthetic cells"}})
    seen = words(tmp_path)
    assert "Synthetic data." in seen and "Synthetic: generated images, no patients." in seen


def test_who_dropped_where_and_why_is_listed_and_no_one_is_lost(tmp_path: Path) -> None:
    """A hospital that is neither here nor there is named."""
    drop = {"hospital": "B", "stage": "unmask", "reason": "no power"}
    record = {"round": 1, "status": "ok", "expected": ["A", "B", "C"], "contributed": ["A"]}
    write_files(tmp_path, {"metrics.jsonl": [record | {"dropped": [drop]}]})
    seen = words(tmp_path)
    assert "B, at unmask : no power" in seen
    assert "C: expected, but neither contributed nor recorded as dropped" in seen
    assert "1 ok 3 1" in seen


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(tmp_path: Path, name: str) -> None:
    """Whoever names a hospital, a class, a reason or a key writes no markup."""
    make_sample_run(tmp_path)
    for file in tmp_path.iterdir():
        content = file.read_text("utf-8")
        for old in ("Aachen University Hospital", "basophil", "no reply in time", "bloodmnist",
                    "batch-size", "flwr"):  # fmt: skip
            content = content.replace(json.dumps(old), json.dumps(name))
        file.write_text(content, "utf-8")
    found = page(tmp_path)
    assert "<script" not in found and "<img" not in found
    assert found.count("<svg") == found.count("</svg>") == 5
    assert found.count("</style>") == 1
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff]", found)
    visible = " ".join(re.sub("[\x00\x1b\ud800\ufffe]", "\ufffd", name).split())
    assert str(escape(visible)) in found


@pytest.mark.parametrize("left_out", [*range(16)])
def test_any_subset_of_the_files_makes_a_report(tmp_path: Path, left_out: int) -> None:
    """A run that was killed leaves whatever it had."""
    files = make_sample_run(tmp_path)
    for bit, name in enumerate(files):
        if left_out >> bit & 1:
            (tmp_path / name).unlink()
    seen = words(tmp_path)
    assert ("unfinished" in seen) == (not (tmp_path / "summary.json").exists())
    assert "Limits of these figures" in seen


@pytest.mark.parametrize("value", [None, "x", -1, 1e308, float("nan"), {}, [[1, "x"]]])
def test_a_field_that_is_missing_or_wrong_never_stops_the_report(
    tmp_path: Path, value: object
) -> None:
    """All fields of one file hold nonsense, or are absent, while the others are sound."""
    good = make_sample_run(tmp_path, rounds=2)

    def spoiled(record: Files) -> Files:
        return {} if value is None else dict.fromkeys(record, value)

    for name, content in good.items():
        last = content[-1] if isinstance(content, list) else content
        broken = {**spoiled(last), "round": 2} if name == "metrics.jsonl" else spoiled(last)
        write_files(tmp_path, {name: [*content[:-1], broken] if last is not content else broken})
        assert "</html>" in page(tmp_path)
        write_files(tmp_path, {name: content})
    last = good["metrics.jsonl"][-1]
    parts = {key: spoiled(last[key]) for key in ("test", "train", "validation")}
    write_files(tmp_path, {"metrics.jsonl": [*good["metrics.jsonl"][:-1], last | parts]})
    assert "</html>" in page(tmp_path)


def test_a_failed_run_gives_its_reason_and_claims_no_figures(tmp_path: Path) -> None:
    """Before the first round there is nothing to show but why."""
    summary = {"status": "failed", "reason": "3 of 10 hospitals: below the quorum"}
    write_files(tmp_path, {"summary.json": summary})
    seen = words(tmp_path)
    assert "This run failed." in seen and "3 of 10 hospitals: below the quorum" in seen
    assert "Test accuracy –" in seen


def test_a_torn_line_is_reported_and_the_rest_is_used(tmp_path: Path) -> None:
    """No silent subset of the rounds."""
    make_sample_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"round": 11, "test": {"accu')
    seen = words(tmp_path)
    assert "metrics.jsonl: 1 of 12 records unreadable and left out" in seen
    assert "86.61%" in seen


def test_files_that_disagree_are_pointed_out(tmp_path: Path) -> None:
    """A figure that the rounds don't bear out isn't shown without a word."""
    files = make_sample_run(tmp_path)
    write_files(tmp_path, {"summary.json": files["summary.json"] | {"test_accuracy": 0.99}})
    assert "disagree on accuracy" in words(tmp_path)


def test_without_a_recorded_best_round_the_test_set_chooses_nothing(tmp_path: Path) -> None:
    """The last tested round is shown, though an earlier one scored better."""
    records = [{"round": n, "status": "ok", "test": {"accuracy": 0.9 - n / 10}} for n in (1, 2)]
    write_files(tmp_path, {"metrics.jsonl": records})
    assert "Test accuracy 70.00% Round 2, the last one tested" in words(tmp_path)


def test_the_same_files_give_the_same_bytes(sample: tuple[Path, Files]) -> None:
    """A report can be made again and compared."""
    assert write_report(sample[0]).read_bytes() == write_report(sample[0]).read_bytes()


def test_a_failed_write_leaves_the_old_report_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader sees the old page or the new one."""
    make_sample_run(tmp_path, rounds=2)
    before, names = page(tmp_path), sorted(os.listdir(tmp_path))
    write_files(tmp_path, {"summary.json": {"status": "failed"}})

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text("utf-8") == before
    assert sorted(os.listdir(tmp_path)) == names


def test_a_path_that_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    """The error says what to do."""
    with pytest.raises(DataError, match="What to do"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("count", [1, 11, 25, 61])
def test_any_number_of_classes_and_hospitals_is_drawn(tmp_path: Path, count: int) -> None:
    """Beyond what a chart can hold, the tables go on."""
    names = [f"site {i}" for i in range(count)]
    hospitals = [{"name": n, "train": 9, "val": 1, "labels": [1] * count} for n in names]
    confusion = [[int(i == j) for j in range(count)] for i in range(count)]
    write_files(
        tmp_path,
        {
            "partition.json": {"classes": names, "hospitals": hospitals},
            "metrics.jsonl": [{"round": 0, "test": {"accuracy": 1.0, "confusion": confusion}}],
        },
    )
    seen = words(tmp_path)
    assert f"site {count - 1} 9 1" in seen and f"{count} of {count}" in seen
    assert len(set(charts.colours(count))) >= min(count, 20)


def test_figures_are_written_for_people() -> None:
    """A privacy loss rounds up; the rest rounds to the nearest."""
    assert charts.epsilon(7.981) == "7.99" and charts.epsilon(8.0) == "8.00"
    assert charts.epsilon(float("inf")) == "∞" and charts.epsilon(None) == charts.MISSING
    assert charts.delta(1.9e-4) == "1.9 · 10⁻⁴" and charts.delta(1.0001e-5) == "1.01 · 10⁻⁵"
    assert charts.percent(0.86425, 2) == "86.42%" and charts.whole(12345) == "12,345"
    assert [charts.duration(s) for s in (43.21, 500, 4210)] == [
        "43.2 s", "8 min 20 s", "1 h 10 min",
    ]  # fmt: skip
