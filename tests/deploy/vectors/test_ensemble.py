"""Runs whose vectors are not merged: what they leave, and the ensemble on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client_app.outbox import Outbox
from common.datasets import make_synthetic
from common.errors import ConfigError, ConsiliumError, RoundError
from common.files import consilium_home
from common.model import ModelSpec, build, get_weights
from common.secagg import Identity
from common.vectors import Base, VectorError
from deploy.inprocess import run_in_process
from server_app.registry import Registry
from server_app.vectors.ensemble import FOLDER, MANIFEST, Ensemble
from tests.deploy.vectors.test_commands import consilium
from tests.server_app.vectors.running import summary, the_run

TINY: dict[str, Any] = {
    "mode": "vectors", "dataset": "synthetic", "synthetic-size": 240, "image-size": 16,
    "partition": "dirichlet", "partition-alpha": 1.0, "partition-min-size": 5, "batch-size": 16,
    "model-width": 0.03125, "privacy": "none", "secagg": False, "versions": 1,
}  # fmt: skip
SPEC = ModelSpec(width=0.03125)


def base_file(folder: Path, *, pretrained: bool) -> str:
    weights = get_weights(build(SPEC, seed=0))
    made = Base(version=0, parent=None, model_digest=SPEC.digest(), weights=weights,
                pretrained=pretrained)  # fmt: skip
    made.save(folder / "first.safetensors")
    return str(folder / "first.safetensors")


@pytest.fixture
def random_base(tmp_path: Path) -> str:
    return base_file(tmp_path, pretrained=False)


def fails(settings: dict[str, Any], hospitals: int) -> RoundError:
    with pytest.raises(RoundError) as caught:
        run_in_process(settings, num_hospitals=hospitals)
    return caught.value


def in_it(folder: Path) -> list[str]:
    return Ensemble.read(folder).hospitals


def test_a_run_from_a_random_base_fails_and_leaves_its_ensemble_and_what_that_is_worth(
    random_base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails({**TINY, "base": random_base, "publish-every": 3}, 3)
    assert "random initialisation" in error.what
    assert f"consilium vectors ensemble {the_run().name}" in error.remedy
    told = summary()
    assert (told["status"], told["bases"]) == ("failed", 0)
    left = told["ensemble"]
    assert left["why"] == "merge-base"
    assert left["hospitals"] == ["hospital-00", "hospital-01", "hospital-02"]
    made = Ensemble.read(the_run() / FOLDER)
    data = make_synthetic(240, image_size=16)
    test = made.figures(data.test)
    assert left["test_accuracy"] == pytest.approx(test["accuracy"])
    assert left["test_macro_f1"] == pytest.approx(test["macro_f1"])
    assert 0 <= left["validation"] <= 1
    said = capsys.readouterr().out
    assert "nothing is merged (merge-base)" in said
    assert "3 models: test accuracy" in said
    rows = [json.loads(row) for row in (the_run() / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["event"] == "ensemble"


def test_two_hospitals_with_different_classes_are_not_merged_and_their_ensemble_is_left(
    tmp_path: Path,
) -> None:
    base = base_file(tmp_path, pretrained=True)
    error = fails({**TINY, "base": base, "publish-every": 2, "publish-quorum": 2}, 2)
    assert "wait for 3 hospitals" in error.remedy
    assert "consilium vectors ensemble" in error.remedy
    assert summary()["ensemble"]["why"] == "merge-few"
    assert in_it(the_run() / FOLDER) == ["hospital-00", "hospital-01"]


def test_a_run_that_ends_by_the_clock_fails_as_well_if_nothing_could_be_merged(
    random_base: str,
) -> None:
    settings = {**TINY, "base": random_base, "versions": 0, "duration": 6.0, "publish-every": 3}
    error = fails(settings, 3)
    assert "the time is over, and there is no base 1" in error.what
    assert summary()["ensemble"]["vectors"] == len(in_it(the_run() / FOLDER)) > 0


def test_a_run_that_merges_has_no_ensemble(tmp_path: Path) -> None:
    base = base_file(tmp_path, pretrained=True)
    settings = {**TINY, "base": base, "publish-every": 3, "publish-margin": 100.0}
    run_in_process(settings, num_hospitals=3)
    assert summary()["ensemble"] is None
    assert not (the_run() / FOLDER).exists()
    with pytest.raises(VectorError, match="no vector waits"):
        consilium("vectors", "ensemble", the_run().name)
    consilium("vectors", "take-back", the_run().name, "1")
    assert "3 models of 3 hospitals" in consilium("vectors", "ensemble", the_run().name)


def test_a_summary_is_not_lost_with_an_ensemble_that_cannot_be_written(
    random_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server_app.vectors.ensemble.atomic_write", full)
    fails({**TINY, "base": random_base, "publish-every": 3}, 3)
    assert "No space left" in summary()["ensemble"]["error"]
    assert summary()["status"] == "failed"


def test_a_hospital_that_takes_its_vector_back_is_in_the_ensemble_no_more(
    random_base: str,
) -> None:
    settings = {**TINY, "base": random_base, "publish-every": 3}
    fails(settings, 3)
    run = the_run().name
    home = consilium_home() / "simulation" / "hospital-01"
    outbox = Outbox(home / "runs" / run / "outbox")
    (item,) = outbox.items()
    outbox.withdraw(item.serial, "hospital-01", Identity((home / "identity.key").read_bytes()))
    assert in_it(the_run() / FOLDER) == ["hospital-00", "hospital-01", "hospital-02"]
    fails({**settings, "resume": run}, 3)
    assert in_it(the_run() / FOLDER) == ["hospital-00", "hospital-02"]
    assert not list((the_run() / FOLDER).glob(f"*{item.serial}*"))


def npz(path: Path, side: int) -> str:
    data = make_synthetic(240, image_size=side)
    arrays: dict[str, np.ndarray] = {}
    for name, part in (("train", data.train), ("val", data.val), ("test", data.test)):
        arrays |= {f"{name}_images": part.images, f"{name}_labels": part.labels}
    np.savez_compressed(path, allow_pickle=False, **arrays)
    return str(path)


def test_the_command_compares_base_merged_model_and_ensemble_without_excluded_vectors(
    random_base: str, tmp_path: Path
) -> None:
    fails({**TINY, "base": random_base, "publish-every": 3}, 3)
    run = the_run().name
    with Registry(the_run() / "registry", create=False) as registry:
        serials = {e.row.hospital: e.row.serial for e in registry.vectors()}
    out, data = tmp_path / "out", npz(tmp_path / "own.npz", 16)
    said = consilium("vectors", "ensemble", run, "--out", str(out), "--data", data)
    assert "not to be merged: the base is a random initialisation" in said
    lines = {line.split()[1]: line for line in said.splitlines() if line.count("%") == 4}
    assert set(lines) == {"base", "merged", "ensemble"}
    figures = Ensemble.read(out).figures(make_synthetic(240, image_size=16).test)
    assert f"{100 * figures['accuracy']:.1f} %" in lines["ensemble"]
    assert "40 test images" in " ".join(said.split())
    assert "is removed" in consilium("vectors", "exclude", run, serials["hospital-02"])
    assert not (the_run() / FOLDER / MANIFEST).exists()
    said = consilium("vectors", "ensemble", run)
    assert "2 models of 2 hospitals" in said
    assert in_it(the_run() / FOLDER) == ["hospital-00", "hospital-01"]
    assert "is removed" not in consilium("vectors", "include", run, serials["hospital-02"])
    with pytest.raises(ConfigError, match="those of the run"):
        consilium("vectors", "ensemble", run, "--data", npz(tmp_path / "large.npz", 20))
    with pytest.raises(ConsiliumError, match="no file"):
        consilium("vectors", "ensemble", run, "--data", str(tmp_path / "none.npz"))
