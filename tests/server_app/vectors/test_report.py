"""What the report of a run of vectors shows, and what it says first."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server_app.report import write_report
from tests.server_app.test_report import Files, page, words, write_files
from tests.server_app.vectors.report_sample import changed, make_sample_run, serial


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
