"""The ensemble of a registry's fine-tuned models: what is in it, how it is kept, what it is for."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.datasets import ImageSet
from common.errors import DataError, ModelError
from common.files import atomic_write
from common.model import ModelSpec, build, get_weights, set_weights
from common.training import TrainSettings, to_tensor, train
from common.vectors import Base, Rule, TaskVector, VectorError, apply_update, bucket_of, ensemble
from common.vectors.tensors import pack
from server_app.evaluation import Evaluator
from server_app.registry import Registry
from server_app.vectors import ensemble as module
from server_app.vectors.ensemble import MANIFEST, Ensemble, forget_ensemble, write_ensemble
from tests.common.vectors.building import CREATED, serial
from tests.server_app.registry.building import KEYS, arrives, refused, withdrawal

SPEC = ModelSpec(width=0.03125, num_classes=3)
CLASSES = ("a", "b", "c")
IMAGES = np.random.default_rng(7).integers(0, 256, (9, 12, 12, 3), dtype=np.uint8)


def random_base(spec: ModelSpec = SPEC) -> Base:
    weights = get_weights(build(spec, seed=0))
    return Base(version=0, parent=None, model_digest=spec.digest(), weights=weights,
                pretrained=False)  # fmt: skip


def values(number: int, base: Base) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(100 + number)
    shapes = base.template()
    return {k: np.asarray(0.1 * rng.normal(size=s), np.float32) for k, s in shapes.items()}


def vector(number: int, base: Base, **changes: Any) -> TaskVector:
    told: dict[str, Any] = {
        "hospital": f"h{number}", "base": base.id, "values": values(number, base),
        "bucket": 1 << number, "serial": serial(number), "created": CREATED,
    }  # fmt: skip
    return TaskVector(**(told | changes))


def filled(folder: Path, *numbers: int) -> Registry:
    made, base = Registry(folder), random_base()
    made.add_base(base)
    for number in numbers:
        arrives(made, vector(number, base))
    return made


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with filled(tmp_path / "registry", 0, 1, 2, 3) as made:
        yield made


def written(registry: Registry, folder: Path) -> Ensemble:
    return write_ensemble(registry, folder, run="a-run", spec=SPEC, classes=CLASSES)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def cells(count: int, seed: int) -> ImageSet:
    """Noise around one of four colours, which are the classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    colours = np.array([[190, 90, 90], [90, 190, 90], [90, 90, 190], [130, 130, 130]])
    drawn = colours[labels][:, None, None, :] + rng.normal(0, 70, (count, 12, 12, 3))
    return ImageSet(np.clip(drawn, 0, 255).astype(np.uint8), labels)


def skewed_vectors(images: ImageSet, base: Base, spec: ModelSpec) -> Iterator[TaskVector]:
    """Of four hospitals, each with half of two classes and an eighth of the others."""
    settings = TrainSettings(epochs=10, batch_size=16, learning_rate=0.005, optimizer="adam")
    turn = np.arange(len(images))
    for number in range(4):
        often = np.isin(images.labels, (number, (number + 1) % 4))
        held = np.where(often, turn % 2 == number % 2, turn % 8 == number)
        pixels, labels = to_tensor(images.images[held]), torch.from_numpy(images.labels[held])
        made = train(build(spec), base.weights, pixels, labels, settings, seed=number)
        yield vector(number, base, values=made.update, bucket=bucket_of(int(held.sum())))


def test_from_a_random_base_under_label_skew_the_ensemble_is_good_where_the_merged_model_is_not(
    tmp_path: Path,
) -> None:
    spec, names = ModelSpec(width=0.03125, num_classes=4), ("red", "green", "blue", "grey")
    base, held_out = random_base(spec), cells(200, seed=1)
    evaluate = Evaluator(spec, held_out, names)
    with Registry(tmp_path / "registry") as registry:
        registry.add_base(base)
        for made in skewed_vectors(cells(480, seed=0), base, spec):
            arrives(registry, made)
        refused("merge-base", registry.publish, Rule())
        together = write_ensemble(
            registry, tmp_path / "out", run="a-run", spec=spec, classes=names
        )  # fmt: skip
        merged = evaluate(registry.candidate(Rule()).weights)["accuracy"]
    found = together.figures(held_out)
    single = [evaluate(together.weights_of(m))["accuracy"] for m in together.manifest.members]
    assert set(found) == set(evaluate(base.weights))
    assert found["accuracy"] > 0.85
    assert merged < 0.75 and max(single) < found["accuracy"]


def test_the_answer_is_the_formulas_over_base_plus_vector_for_each_that_waits(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, base = written(registry, tmp_path / "out"), random_base()
    model, logits = build(SPEC), {}
    model.eval()
    for number in range(4):
        set_weights(model, apply_update(base.weights, values(number, base)))
        with torch.no_grad():
            logits[serial(number)] = model(to_tensor(IMAGES)).numpy()
    expected = ensemble(logits, {serial(n): float(1 << n) for n in range(4)})
    assert made.probabilities(IMAGES).tobytes() == expected.tobytes()
    assert made.probabilities(IMAGES).shape == (9, 3)
    assert made.hospitals == ["h0", "h1", "h2", "h3"]
    assert [m.serial for m in made.manifest.members] == sorted(logits)
    assert (made.manifest.base, made.manifest.base_version) == (base.id, 0)
    monkeypatch.setattr(module, "BATCH", 2)
    np.testing.assert_allclose(made.probabilities(IMAGES), expected, atol=1e-6)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {0o600}


def test_a_withdrawn_vector_leaves_the_ensemble_that_would_have_been_without_it_bit_for_bit(
    registry: Registry, tmp_path: Path
) -> None:
    before = written(registry, tmp_path / "out").probabilities(IMAGES)
    registry.withdraw(withdrawal(2), KEYS)
    assert forget_ensemble(registry, tmp_path / "out")
    assert content(tmp_path / "out") == {}
    after = written(registry, tmp_path / "out")
    with filled(tmp_path / "other", 3, 0, 1) as without:
        never = written(without, tmp_path / "never")
    assert content(tmp_path / "out") == content(tmp_path / "never")
    assert after.probabilities(IMAGES).tobytes() == never.probabilities(IMAGES).tobytes()
    assert not np.allclose(after.probabilities(IMAGES), before)
    assert not forget_ensemble(registry, tmp_path / "out")


def test_an_excluded_vector_is_in_no_ensemble_until_it_is_included_again(
    registry: Registry, tmp_path: Path
) -> None:
    written(registry, tmp_path / "out")
    first = content(tmp_path / "out")
    registry.exclude(serial(1), "it harms")
    assert written(registry, tmp_path / "out").hospitals == ["h0", "h2", "h3"]
    assert not [name for name in content(tmp_path / "out") if name.startswith(serial(1))]
    registry.include(serial(1))
    written(registry, tmp_path / "out")
    assert content(tmp_path / "out") == first


def test_a_vector_taken_back_while_the_files_are_written_is_not_left_there(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken_back(path: Path, *args: Any, **kwargs: Any) -> None:
        atomic_write(path, *args, **kwargs)
        if path.name == MANIFEST:
            registry.withdraw(withdrawal(0), KEYS)

    monkeypatch.setattr(module, "atomic_write", taken_back)
    refused("registry-moved", written, registry, tmp_path / "out")
    assert content(tmp_path / "out") == {}


def test_vectors_of_older_bases_and_published_ones_are_not_in_it(
    registry: Registry, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server_app.registry.line.merge_refusal", lambda **_: None)
        base = registry.publish(Rule())
    refused("ensemble-empty", written, registry, tmp_path / "out")
    arrives(registry, vector(4, random_base()))  # late: for the base before
    refused("ensemble-empty", written, registry, tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()
    arrives(registry, vector(5, base))
    made = written(registry, tmp_path / "out")
    assert (made.hospitals, made.manifest.base) == (["h5"], base.id)
    registry.exclude(serial(0), "it was in the base")  # which is made anew without it
    assert forget_ensemble(registry, tmp_path / "out")


def test_another_model_than_the_bases_is_refused(registry: Registry, tmp_path: Path) -> None:
    wrong = ModelSpec(width=0.03125, num_classes=4)
    error = refused(
        "base-model", write_ensemble, registry, tmp_path / "out", run="a-run", spec=wrong,
        classes=(*CLASSES, "d"),
    )  # fmt: skip
    assert "num_classes=4" in error.what


@pytest.mark.parametrize("when", range(5))
def test_a_kill_at_any_write_leaves_the_ensemble_that_was_there(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    class Killed(BaseException):
        pass

    before = written(registry, tmp_path / "out").probabilities(IMAGES)
    arrives(registry, vector(4, random_base()))
    calls = iter(range(6))

    def dies(*args: Any, **kwargs: Any) -> None:
        if next(calls) == when + 1:
            raise Killed
        atomic_write(*args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(module, "atomic_write", dies)
        with pytest.raises(Killed):
            written(registry, tmp_path / "out")
    assert Ensemble.read(tmp_path / "out").probabilities(IMAGES).tobytes() == before.tobytes()
    assert len(written(registry, tmp_path / "out").hospitals) == 5
    assert len(content(tmp_path / "out")) == 6


def test_files_of_others_in_the_folder_stay(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    theirs = tmp_path / "out" / "notes.safetensors"
    theirs.write_text("theirs")
    written(registry, tmp_path / "out")
    registry.exclude(serial(0), "")
    assert forget_ensemble(registry, tmp_path / "out")
    assert content(tmp_path / "out") == {"notes.safetensors": b"theirs"}


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("change", [flip, lambda d: d[:-1], lambda d: d + b"\0", lambda d: b""])
def test_a_changed_model_file_is_refused_when_read_and_when_asked(
    registry: Registry, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    made = written(registry, tmp_path / "out")
    path = tmp_path / "out" / made.manifest.members[1].file
    path.write_bytes(change(path.read_bytes()))
    error = refused("ensemble-digest", Ensemble.read, tmp_path / "out")
    assert path.name in error.what
    refused("ensemble-digest", made.probabilities, IMAGES)
    path.unlink()
    refused("ensemble-file", Ensemble.read, tmp_path / "out")
    assert path.name in written(registry, tmp_path / "out").manifest.members[1].file


def replaced(folder: Path, weights: dict[str, np.ndarray]) -> None:
    """The first model's file and its line in the manifest are those of ``weights``."""
    told = json.loads((folder / MANIFEST).read_text())
    first = told["members"][0]
    data = pack(weights, {})
    first |= {"size": len(data), "digest": hashlib.sha256(data).hexdigest()}
    (folder / f"{first['serial']}-{first['digest'][:16]}.safetensors").write_bytes(data)
    (folder / MANIFEST).write_text(json.dumps(told))


def test_a_model_of_another_shape_or_not_finite_is_refused_whatever_its_digest(
    registry: Registry, tmp_path: Path
) -> None:
    written(registry, tmp_path / "out")
    weights = get_weights(build(SPEC))
    replaced(tmp_path / "out", weights | {"head.bias": np.array([0, np.nan, 0], np.float32)})
    with pytest.raises(ModelError, match="NaN"):
        Ensemble.read(tmp_path / "out")
    replaced(tmp_path / "out", weights | {"head.bias": np.zeros(4, np.float32)})
    with pytest.raises(ModelError, match=r"head\.bias"):
        Ensemble.read(tmp_path / "out")
    replaced(tmp_path / "out", weights)
    assert Ensemble.read(tmp_path / "out").hospitals


def put(*where: Any) -> Callable[[Any], Any]:
    *path, value = where

    def change(told: Any) -> Any:
        place = told
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        return told

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("version", 2), put("base", "x"), put("base", 5), put("base-version", -1),
        put("base-version", True), put("run", None), put("more", 1), put("classes", ["a", "b"]),
        put("classes", [1, 2, 3]), put("classes", None), put("members", []), put("members", 3),
        put("members", [1]), put("model", None), put("model", {"width": 1.0, "depth": 3}),
        put("model", "width", 1e9), put("model", "width", "wide"), put("model", "model", "vgg"),
        put("model", "num_classes", True), put("members", 0, "weight", 0),
        put("members", 0, "weight", 0.5), put("members", 0, "size", -1),
        put("members", 0, "digest", "../../etc"), put("members", 0, "serial", "../x"),
        put("members", 0, "hospital", ""), put("members", 0, "epsilon", "low"),
        put("members", 0, "epsilon", float("nan")), put("members", 0, "more", 1),
        lambda told: told | {"members": told["members"][::-1]},
        lambda told: told | {"members": told["members"][:1] * 2},
        lambda told: [told],
    ],
)  # fmt: skip
def test_a_malformed_manifest_is_refused_and_its_ensemble_forgotten(
    registry: Registry, tmp_path: Path, change: Callable[[Any], Any]
) -> None:
    folder = tmp_path / "out"
    written(registry, folder)
    told = change(json.loads((folder / MANIFEST).read_text()))
    (folder / MANIFEST).write_text(json.dumps(told))
    with pytest.raises(VectorError) as caught:
        Ensemble.read(folder)
    assert caught.value.code in ("ensemble-format", "vector-format")
    assert caught.value.what and caught.value.remedy
    assert forget_ensemble(registry, folder)
    assert content(folder) == {}


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff", " " * (4 << 20) + "{}"])
def test_a_manifest_that_is_no_json_of_a_sensible_size_is_refused(
    registry: Registry, tmp_path: Path, text: str
) -> None:
    written(registry, tmp_path / "out")
    (tmp_path / "out" / MANIFEST).write_bytes(text.encode("latin-1"))
    refused("ensemble-format", Ensemble.read, tmp_path / "out")
    refused("ensemble-file", Ensemble.read, tmp_path / "nothing")


@pytest.mark.parametrize(
    "images",
    [IMAGES[..., :1], IMAGES.astype(np.float32), IMAGES[0], IMAGES[:0], IMAGES[..., 0]],
)
def test_images_of_another_kind_are_refused(
    registry: Registry, tmp_path: Path, images: np.ndarray
) -> None:
    with pytest.raises(DataError):
        written(registry, tmp_path / "out").probabilities(images)
