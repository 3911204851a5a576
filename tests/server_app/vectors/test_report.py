"""Properties of the report of a run of vectors. ``make_sample_run`` leaves one to look at."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape
from safetensors.numpy import save_file

from common.errors import RoundError
from common.model import ModelSpec, build, get_weights
from deploy.inprocess import run_in_process
from server_app.report import INPUTS, write_report
from server_app.run_store import runs_directory
from server_app.vectors import strategy
from tests.server_app.test_report import CLASSES, Files, page, words, write_files

NAMES = ("Aachen", "Bergen", "Coimbra", "Debrecen", "Esbjerg")
START = "2026-03-01T08:00:00Z"


def time(minutes: int) -> str:
    return f"2026-03-01T{8 + minutes // 60:02d}:{minutes % 60:02d}:00Z"


def serial(number: int) -> str:
    return f"{number:032x}"


def influence(accuracy: float, **without: float) -> Files:
    rows: list[Files] = [
        {"hospital": name, "without": value, "influence": accuracy - value,
         "harmful": value - accuracy > 0.02}
        for name, value in without.items()
    ]  # fmt: skip
    rows.sort(key=lambda row: row["influence"])
    return {"accuracy": accuracy, "margin": 0.02, "rows": rows}


def arrival(minutes: int, number: int, hospital: str, **other: Any) -> Files:
    return {
        "time": time(minutes), "event": "arrival", "hospital": hospital, "serial": serial(number),
        "version": 0, "staleness": 0, "norm": 1.25 + number / 100, "bucket": 512,
        "epsilon": 3.4512, "delta": 1e-4,
        "metrics": {"val-correct": 180, "val-examples": 200, "tuned-correct": 186,
                    "tuned-examples": 200},
        "validation": 0.91 + number / 1000, "superseded": False,
    } | other  # fmt: skip


def base(minutes: int, version: int, accuracy: float, **other: Any) -> Files:
    return {
        "time": time(minutes), "event": "base", "version": version, "base": f"{version:064x}",
        "why": "published" if version else "first", "hospitals": list(NAMES[:3]) if version else [],
        "vectors": 3 if version else 0, "validation": accuracy, "influence": None,
        "test": {"accuracy": accuracy - 0.01, "macro_f1": accuracy - 0.02, "macro_auc": 0.99,
                 "loss": 0.3, "per_class": [{"name": name, "support": 100} for name in CLASSES]},
    } | other  # fmt: skip


def make_sample_run(path: Path, *, private: bool = True) -> Files:
    """Write a made-up run in which most of what can happen happens; return what it wrote."""
    spent = {} if private else {"epsilon": None, "delta": None}
    metrics = [
        base(0, 0, 0.912),
        arrival(10, 1, "Aachen", **spent),
        arrival(25, 2, "Bergen", **spent),
        arrival(31, 3, "Coimbra", **spent),
        base(31, 1, 0.925, influence=influence(0.925, Aachen=0.91, Bergen=0.92, Coimbra=0.95)),
        arrival(44, 4, "Debrecen", staleness=1, **spent),
        {"time": time(50), "event": "refused", "hospital": "Esbjerg", "code": "vector-norm",
         "serial": serial(5)},
        {"time": time(55), "event": "refusal", "hospital": "Esbjerg", "code": "vectors-policy",
         "id": "c0ffee"},
        arrival(61, 6, "Aachen", version=1, **spent),
        {"time": time(70), "event": "held", "version": 1, "code": "registry-gate",
         "gate": {"adopt": False, "current": 0.925, "candidate": 0.871, "margin": 0.0123},
         "influence": influence(0.871, Coimbra=0.924)},
        {"time": time(75), "event": "excluded", "hospital": "Coimbra", "serial": serial(3),
         "reason": "its norm 9.1 is above 6.25"},
        {"time": time(80), "event": "withdrawal", "hospital": "Bergen", "serial": serial(2)},
        base(80, 1, 0.921, why="made anew without a vector that Bergen took back", hospitals=[],
             vectors=0),
        arrival(95, 7, "Debrecen", version=1, **spent),
        base(95, 2, 0.933, hospitals=["Aachen", "Debrecen"]),
    ]  # fmt: skip
    both = [3.4512, 3.4512] if private else []
    summary = {
        "run": "x", "mode": "vectors", "status": "completed", "reason": None, "bases": 2,
        "current_version": 2, "best_version": 2, "hospitals": 5, "validation": 0.933,
        "test_accuracy": 0.923, "test_macro_f1": 0.913, "test_macro_auc": 0.99,
        "privacy": "local" if private else "none",
        "privacy_unit": "patient" if private else None,
        "epsilon": 3.4512 if private else None, "delta": 1e-4 if private else None,
        "by_hospital": {
            "Aachen": {"vectors": 2, "published": 2, "states": {"accepted": 2}, "epsilons": both},
            "Bergen": {"vectors": 1, "published": 0, "states": {"withdrawn": 1}, "epsilons": []},
            "Coimbra": {"vectors": 1, "published": 0, "states": {"excluded": 1},
                        "epsilons": both[:1]},
            "Debrecen": {"vectors": 2, "published": 2, "states": {"accepted": 2}, "epsilons": both},
        },
        "influence": influence(0.933, Aachen=0.921, Debrecen=0.96), "ensemble": None,
        "secagg": False, "source": "bloodmnist", "source_sha256": "ab" * 32,
        "versions": {"consilium": "0.1.0", "flwr": "1.41.0"}, "wall_seconds": 5712.4,
    }  # fmt: skip
    config = {"mode": "vectors", "privacy": summary["privacy"], "epsilon": 4.0, "roster": "",
              "base": "/data/base.safetensors", "judged-by": "public",
              "publish-every": 3}  # fmt: skip
    partition = {"scheme": "iid", "classes": list(CLASSES), "hospitals": [
        {"name": name, "train": 900, "val": 100, "labels": [125] * 8} for name in NAMES
    ]}  # fmt: skip
    files: Files = dict(zip(INPUTS, (config, partition, metrics, summary), strict=True))
    write_files(path, files)
    return files


def changed(path: Path, name: str, **values: Any) -> None:
    """Overwrite entries of one of the sample's JSON files."""
    write_files(path, {name: json.loads((path / name).read_text("utf-8")) | values})


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Files]:
    path = tmp_path_factory.mktemp("runs") / "sample"
    return path, make_sample_run(path)


def test_the_page_refers_to_nothing_outside_itself_and_runs_nothing(
    sample: tuple[Path, Files],
) -> None:
    found = page(sample[0])
    assert "http://" not in found and "https://" not in found
    assert not re.search(r"<(script|iframe|img|object|embed|base|form)\b|@import|\son\w+=", found)
    for target in re.findall(r'(?:src|href)="([^"]*)"', found):
        assert target.startswith(("#", "data:"))
    assert "default-src 'none'" in found


def test_drawings_have_words_and_unique_ids_and_every_table_a_caption(
    sample: tuple[Path, Files],
) -> None:
    found = page(sample[0])
    assert found.count("<svg") == 5  # timeline, two of accuracy, influence, who holds what
    assert all('role="img" aria-label="' in tag for tag in re.findall(r"<svg[^>]*>", found))
    assert found.count("<caption>") == found.count("<table")
    ids = re.findall(r'\bid="([^"]*)"', found)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', found)) <= set(ids)


def test_what_was_not_protected_comes_before_any_figure(tmp_path: Path) -> None:
    make_sample_run(tmp_path, private=False)
    seen = words(tmp_path)
    first = seen.index("Test accuracy")
    for gap in (
        "What this run did NOT protect", "Single vectors were not hidden from the server",
        "No differential privacy in this run", "Hospitals were not authenticated",
    ):  # fmt: skip
        assert seen.index(gap) < first
    assert "ε =" not in seen and "Sum of ε" not in seen


def test_epsilon_is_said_to_be_of_one_vector_and_the_sum_counts_what_was_taken_back(
    sample: tuple[Path, Files],
) -> None:
    seen = words(sample[0])
    assert "No differential privacy" not in seen
    assert "ε = 3.46 δ = 1 · 10⁻⁴ For ONE vector, per patient" in seen  # 3.4512, rounded up
    assert "ε is for ONE vector. A hospital that sent more has spent more: up to 2" in seen
    assert "Aachen 2 0 2 1, 2 2 accepted ≥ 512 3.46, 3.46 6.91" in seen
    assert "Bergen 1 0 0 1 1 withdrawn ≥ 512 3.46 3.46" in seen


def test_a_vector_without_privacy_in_a_private_run_is_pointed_out(tmp_path: Path) -> None:
    files = make_sample_run(tmp_path)
    bare = [r | {"epsilon": None} if r.get("serial") == serial(4) else r
            for r in files["metrics.jsonl"]]  # fmt: skip
    write_files(tmp_path, {"metrics.jsonl": bare})
    seen = words(tmp_path)
    assert "1 vector came without differential privacy." in seen and "1 without privacy" in seen


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"roster": "/keys/roster.json"}, ""),
        ({"roster": ""}, "Hospitals were not authenticated."),
        ({"roster": None}, "Whether hospitals were authenticated is not recorded."),
    ],
)
def test_authentication_is_claimed_only_with_a_roster(
    tmp_path: Path, config: Files, said: str
) -> None:
    make_sample_run(tmp_path)
    changed(tmp_path, "config.json", **config)
    seen = words(tmp_path)
    assert ("authenticated" in seen) == bool(said) and said in seen


@pytest.mark.parametrize("by", ["public", "none", "hospitals"])
def test_bases_that_nobody_judged_are_told(tmp_path: Path, by: str) -> None:
    files = make_sample_run(tmp_path)
    changed(tmp_path, "config.json", **{"judged-by": by})
    assert ("without being judged" in words(tmp_path)) == (by == "none")
    unseen = [r | {"validation": None} if "validation" in r else r for r in files["metrics.jsonl"]]
    write_files(tmp_path, {"metrics.jsonl": unseen})
    assert ("without being judged" in words(tmp_path)) == (by != "hospitals")


@pytest.mark.parametrize(
    ("gate", "unjudged"),
    [
        ({"adopt": True, "candidate": 0.9, "current": 0.9, "margin": 0.1}, False),
        ({"adopt": True, "candidate": None, "current": None, "margin": 2.0, "gained": 3, "lost": 1},
         False),
        ({"adopt": True, "candidate": None, "current": None, "margin": 0.0}, True),
        (None, False), ("adopted", False),
    ],
)  # fmt: skip
def test_a_base_that_was_published_by_hand_unjudged_is_told_whoever_judges_the_run(
    tmp_path: Path, gate: object, unjudged: bool
) -> None:
    files = make_sample_run(tmp_path)
    changed(tmp_path, "config.json", **{"judged-by": "hospitals"})
    rows = [r | {"gate": gate} if r["event"] == "base" and r["version"] == 2 else r
            for r in files["metrics.jsonl"]]  # fmt: skip
    write_files(tmp_path, {"metrics.jsonl": rows})
    assert ("without being judged" in words(tmp_path)) == unjudged


def test_figures_shown_equal_those_in_the_files(sample: tuple[Path, Files]) -> None:
    path, files = sample
    seen = words(path)
    assert "Test accuracy 92.30% Base 2, the best by validation; 800 test images" in seen
    assert "Validation accuracy 93.30% On public images; the first base had 91.20%" in seen
    assert "Bases published 2 Base 2 is current. 1 candidate was held back." in seen
    assert "Vectors 6 1 late, 1 more refused, 1 excluded, 1 taken back." in seen
    assert "Hospitals 4 of 5 have sent a vector. 1 refusal by hospitals." in seen
    assert "1 h 35 min" in seen
    for row in files["metrics.jsonl"]:
        when = row["time"].replace("T", " ").rstrip("Z")
        assert when in seen
        if row["event"] == "arrival":
            own = f"90.0% → 93.0% {100 * row['validation']:.2f}% {row['serial']}"
            line = f"{row['norm']:.3f} ≥ 512 3.46 1 · 10⁻⁴ {own}"
            assert line in seen
        if row["event"] == "base":
            assert f"{100 * row['validation']:.2f}%" in seen
            assert f"{100 * row['test']['accuracy']:.2f}%" in seen
    for key, value in files["config.json"].items():
        assert f"{key} {value}" in seen
    assert "flwr 1.41.0" in seen and "ab" * 32 in seen and "bloodmnist" in seen


def test_what_was_held_refused_excluded_and_taken_back_is_listed_with_why(
    sample: tuple[Path, Files],
) -> None:
    seen = words(sample[0])
    assert "87.10% 92.50% −5.4 points 1.2 points Coimbra" in seen
    assert f"refused by the server vector-norm it is far larger than the others' vectors " \
           f"{serial(5)}" in seen  # fmt: skip
    assert "the hospital refused vectors-policy its policy lets no such vector leave" in seen
    assert "c0ffee" in seen and "excluded its norm 9.1 is above 6.25" in seen
    assert f"taken back by the hospital – {serial(2)}" in seen
    assert "what other hospitals learned from a base that contained it stays" in seen


def test_late_vectors_and_harmful_hospitals_are_marked(sample: tuple[Path, Files]) -> None:
    found, seen = page(sample[0]), words(sample[0])
    assert found.count('<span class="badge warn">1</span>') == 1
    assert "Debrecen 2 1 2 2 2 accepted" in seen
    assert "96.00% −2.7 points harms" in seen and "92.10% +1.2 points 0" in seen
    assert "on the base that was current at the end" in seen
    assert "arrived late: for an older base" in seen and "−2.7 points (harms)" in seen
    assert "base 1 held after base 1" in seen  # influences at each judgement


def test_figures_of_a_base_that_was_made_anew_are_not_those_of_its_first_making(
    tmp_path: Path,
) -> None:
    """After a withdrawal version 1 is another model; no line tells how good that one is."""
    make_sample_run(tmp_path)
    changed(tmp_path, "summary.json", best_version=1, test_accuracy=0.911, validation=0.921)
    assert "Test accuracy 91.10% Base 1" in words(tmp_path)
    assert "1 replaced later" in words(tmp_path)
    assert "made anew without a vector that Bergen took back – – 92.10%" in words(tmp_path)
    changed(tmp_path, "summary.json", test_accuracy=None, validation=None)
    seen = words(tmp_path)
    assert "Test accuracy – No test figures of the best base were recorded" in seen


def test_without_a_summary_the_test_images_choose_nothing(tmp_path: Path) -> None:
    files = make_sample_run(tmp_path)
    (tmp_path / "summary.json").unlink()
    flattered = [r | {"test": r["test"] | {"accuracy": 0.999}} if r.get("version") == 0
                 and r["event"] == "base" else r for r in files["metrics.jsonl"]]  # fmt: skip
    write_files(tmp_path, {"metrics.jsonl": flattered})
    seen = words(tmp_path)
    assert "unfinished" in seen and "Test accuracy 92.30% Base 2, the best by validation" in seen


def test_lines_that_a_resumed_run_made_anew_stand_where_they_belong(tmp_path: Path) -> None:
    """A kill loses a line; the registry gives it back at the end of the file, with its own time."""
    files = make_sample_run(tmp_path)
    before = page(tmp_path)
    lines = files["metrics.jsonl"]
    write_files(tmp_path, {"metrics.jsonl": [r for r in lines if r.get("serial") != serial(1)]
                           + [lines[1]]})  # fmt: skip
    after = page(tmp_path)
    mask = re.compile("[0-9a-f]{64}")  # the file itself is another
    assert mask.sub("", before) == mask.sub("", after)


@pytest.mark.parametrize("reason", ["no hospital was there within 5 s", None])
def test_a_failed_run_without_any_arrival_has_a_report(tmp_path: Path, reason: str | None) -> None:
    summary: Files = {"mode": "vectors", "status": "failed", "reason": reason, "bases": 0,
               "by_hospital": {}, "influence": None, "privacy": "none"}  # fmt: skip
    write_files(tmp_path, {"summary.json": summary, "metrics.jsonl": [base(0, 0, 0.9)]})
    seen = words(tmp_path)
    assert "This run failed." in seen and (reason or "No reason was recorded") in seen
    assert seen.count("No vector arrived.") == 2
    assert "Vectors 0 0 late" in seen


def test_the_mode_is_known_from_whichever_file_is_left(tmp_path: Path) -> None:
    files = make_sample_run(tmp_path)
    for kept in ("summary.json", "config.json", "metrics.jsonl"):
        folder = tmp_path / kept.partition(".")[0]
        write_files(folder, {kept: files[kept]})
        assert "Training by task vectors" in words(folder)


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>",
        "\"><img src=x onerror=alert(1)> ' &amp; </svg></style>",
        r"$\frac{$ _x {{ 7*7 }} {% raw %}",
        "]]>--><!-- \x00\x1b\ud800\ufffe\n end",
        "病院 مستشفى " + "long " * 40,
    ],
)
def test_hostile_names_stay_text(tmp_path: Path, name: str) -> None:
    """Whoever names a hospital, a serial, a code, a reason, a class or a key writes no markup."""
    make_sample_run(tmp_path)
    for file in tmp_path.iterdir():
        content = file.read_text("utf-8")
        for old in ("Aachen", "Coimbra", serial(6), "vector-norm", "registry-gate", "c0ffee",
                    "its norm 9.1 is above 6.25", "published", "accepted", "bloodmnist", "flwr",
                    "publish-every", "basophil", "iid"):  # fmt: skip
            content = content.replace(json.dumps(old), json.dumps(name))
        file.write_text(content, "utf-8")
    found = page(tmp_path)
    assert "<script" not in found and "<img" not in found
    assert found.count("<svg") == found.count("</svg>") == 5
    assert found.count("</style>") == 1
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff]", found)
    visible = " ".join(re.sub("[\x00\x1b\ud800\ufffe]", "\ufffd", name).split())
    assert found.count(str(escape(visible))) > 8


@pytest.mark.parametrize("left_out", [*range(16)])
def test_any_subset_of_the_files_makes_a_report(tmp_path: Path, left_out: int) -> None:
    files = make_sample_run(tmp_path)
    for bit, name in enumerate(files):
        if left_out >> bit & 1:
            (tmp_path / name).unlink()
    seen = words(tmp_path)
    assert ("unfinished" in seen) == (not (tmp_path / "summary.json").exists())
    assert "Limits of these figures" in seen


@pytest.mark.parametrize(
    "value",
    [None, "x", -1, 1e308, float("nan"), {}, [[1, "x"]], {"rows": [{}], "x": {"states": 3}}],
)
def test_a_field_that_is_missing_or_wrong_never_stops_the_report(
    tmp_path: Path, value: object
) -> None:
    """Each field in its turn, and all of a line or a file at once."""
    good = make_sample_run(tmp_path)
    for name in ("summary.json", "config.json"):
        write_files(tmp_path, {name: dict.fromkeys(good[name], value) | {"mode": "vectors"}})
        assert "Training by task vectors" in words(tmp_path)
        write_files(tmp_path, {name: good[name]})
    spoiled = [dict.fromkeys(r, value) | {"event": r["event"]} for r in good["metrics.jsonl"]]
    write_files(tmp_path, {"metrics.jsonl": spoiled})
    assert "Training by task vectors" in words(tmp_path)
    one_by_one = [r | {k: value} for r in good["metrics.jsonl"] for k in r if k != "event"]
    write_files(tmp_path, {"metrics.jsonl": one_by_one})
    assert "Training by task vectors" in words(tmp_path)


def test_lines_that_are_torn_or_of_an_unknown_kind_are_reported(tmp_path: Path) -> None:
    make_sample_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"event": "<b>new</b>", "time": 3}\n{"event": "arri')
    seen = words(tmp_path)
    assert "metrics.jsonl: 1 of 17 records unreadable and left out" in seen
    assert "lines that this version cannot show: 1 × <b>new</b>" in seen
    assert "Vectors 6 1 late" in seen


def test_files_that_disagree_are_pointed_out(tmp_path: Path) -> None:
    make_sample_run(tmp_path)
    assert "not in order" not in words(tmp_path)
    changed(tmp_path, "summary.json", test_accuracy=0.99, by_hospital={"A": {"vectors": 9}})
    seen = words(tmp_path)
    assert "disagree on accuracy: 0.99 and 0.923" in seen
    assert "summary.json counts 9 vectors that were not taken back, and metrics.jsonl 5" in seen


def test_the_hospitals_verdict_on_a_candidate_is_shown_in_images(tmp_path: Path) -> None:
    files = make_sample_run(tmp_path)
    gate = {"adopt": False, "current": None, "candidate": None, "margin": 6.48, "gained": 12,
            "lost": 30, "hospitals": ["Aachen"]}  # fmt: skip
    lines = [r | {"gate": gate} if r["event"] == "held" else r for r in files["metrics.jsonl"]]
    write_files(tmp_path, {"metrics.jsonl": lines})
    assert "12 images gained, 30 lost −18 images 6.5 images" in words(tmp_path)


def test_the_ensemble_that_was_left_is_shown(tmp_path: Path) -> None:
    make_sample_run(tmp_path)
    told = {"why": "merge-few", "vectors": 2, "hospitals": ["Aachen", "Bergen"],
            "validation": 0.88, "test_accuracy": 0.871, "test_macro_f1": 0.8,
            "test_macro_auc": 0.97}  # fmt: skip
    changed(tmp_path, "summary.json", ensemble=told)
    seen = words(tmp_path)
    assert "Nothing was merged: too few hospitals with different mixes of classes" in seen
    assert "ensemble of 2 models of 2 hospitals: test accuracy 87.10%" in seen
    changed(tmp_path, "summary.json", ensemble={"error": "disk full"})
    assert "no ensemble could be made. disk full" in words(tmp_path)


def test_the_same_files_give_the_same_bytes(sample: tuple[Path, Files]) -> None:
    assert write_report(sample[0]).read_bytes() == write_report(sample[0]).read_bytes()


def test_a_run_of_months_stays_a_page_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    files = make_sample_run(tmp_path)
    names = [f"site {i:02d}" for i in range(61)]
    many = [arrival(1 + i % 600, 100 + i, names[i % 61]) for i in range(2000)]
    write_files(tmp_path, {"metrics.jsonl": files["metrics.jsonl"][:1] + many})
    changed(tmp_path, "summary.json", by_hospital=None, influence=None)
    seen = words(tmp_path)
    assert "Vectors 2,000" in seen and "1,500 earlier ones are in metrics.jsonl" in seen
    assert "and 21 more, the largest 3.46" in seen
    assert "The drawing shows the first hospitals" in seen
    assert len(page(tmp_path)) < 3_000_000


# A real one


TINY: dict[str, Any] = {
    "mode": "vectors", "dataset": "synthetic", "synthetic-size": 240, "partition": "iid",
    "batch-size": 16, "model-width": 0.03125, "privacy": "none", "partition-min-size": 5,
    "secagg": False, "versions": 1, "publish-margin": 100.0, "publish-every": 3,
}  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setattr(strategy, "LOOK", 0.05)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    path = tmp_path / "base.safetensors"
    save_file(get_weights(build(ModelSpec(width=0.03125), seed=0)), path)
    return {**TINY, "base": str(path)}


def the_run() -> Path:
    return max(runs_directory().iterdir())


def test_a_run_ends_with_a_report_of_all_of_it_and_so_does_what_resumes_it(
    settings: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    run_in_process(settings, num_hospitals=3)
    told = " ".join(capsys.readouterr().out.split())
    assert str(the_run() / "report.html") in told.replace(" ", "")
    assert "report:" in told
    first = (the_run() / "report.html").read_text("utf-8")
    run_in_process({**settings, "resume": the_run().name, "versions": 2}, num_hospitals=3)
    found = (the_run() / "report.html").read_text("utf-8")
    rows = [json.loads(line) for line in (the_run() / "metrics.jsonl").read_text().splitlines()]
    serials = [row["serial"] for row in rows if row["event"] == "arrival"]
    assert len(serials) == 6
    assert all(s in found for s in serials) and sum(s in first for s in serials) == 3
    seen = words(the_run())
    summary = json.loads((the_run() / "summary.json").read_text())
    assert "completed" in seen and "Bases published 2 Base 2 is current." in seen
    assert f"{100 * summary['test_accuracy']:.2f}%" in seen
    assert "Synthetic data." in seen and "not in order" not in seen


def test_a_run_that_fails_before_any_vector_has_a_report(settings: Files) -> None:
    home = Path(os.environ["CONSILIUM_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    (home / "policy.toml").write_text("version = 1\n[privacy]\nallow-non-private = true\n")
    with pytest.raises(RoundError):
        run_in_process(settings, num_hospitals=3)
    seen = " ".join(words(the_run()).split())
    assert (the_run() / "report.html").exists()
    assert "This run failed." in seen and "No vector arrived." in seen
    assert "3 refusals by hospitals" in seen and "its policy lets no such vector leave" in seen


def test_a_report_that_cannot_be_written_does_not_undo_a_good_run(
    settings: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> Path:
        raise ValueError("no such font")

    monkeypatch.setattr("server_app.vectors.run.write_report", fails)
    run_in_process(settings, num_hospitals=3)
    told = " ".join(capsys.readouterr().out.split())
    assert "the report could not be written: ValueError: no such font" in told
    assert json.loads((the_run() / "summary.json").read_text())["status"] == "completed"
    assert not (the_run() / "report.html").exists()
