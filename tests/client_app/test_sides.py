"""On which side of a hospital's own split a patient is: that patient alone decides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from client_app.data import HospitalData, _own
from client_app.hospital import OwnPictures
from common.datasets import picture_digest
from common.errors import DataError

Rows = list[tuple[str, str, str]]


def hospital_with(folder: Path, rows: Rows) -> HospitalData:
    (folder / "manifest.csv").write_text(
        "file,label,patient\n" + "".join(",".join(row) + "\n" for row in rows)
    )
    own = OwnPictures(folder, None, 0, ("a", "b"), (0, 1))
    return _own(own, 8, 3, 2, True)


def side_of(data: HospitalData) -> dict[tuple[bytes, bytes], str]:
    """(picture, patient) → side."""
    return {
        (digest.tobytes(), patient.tobytes()): side
        for side, part in (("train", data.train), ("val", data.val))
        for digest, patient in zip(part.source.digests, part.source.patients, strict=True)
    }


def test_a_patient_who_holds_copies_of_others_pictures_moves_none_of_them(tmp_path: Path) -> None:
    """One more patient with a copy of a picture of each of fifteen others moved ten of them."""
    rng = np.random.default_rng(0)
    pictures, rows = {}, []
    for patient in range(30):
        for number in range(2):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{patient}_{number}.png")
            pictures[patient, number] = picture_digest(pixels)
            rows.append((f"{patient}_{number}.png", "ab"[patient % 2], f"P{patient}"))
    before = side_of(hospital_with(tmp_path, rows))
    assert set(before.values()) == {"train", "val"}
    assert {digest for digest, _ in before} == set(pictures.values())
    for name in ("PX", "PY", "PZ"):
        copies = []
        for patient in range(15):
            copy = tmp_path / f"copy_{patient}.png"
            copy.write_bytes((tmp_path / f"{patient}_0.png").read_bytes())
            copies.append((copy.name, "ab"[patient % 2], name))
        after = side_of(hospital_with(tmp_path, rows + copies))
        assert before.items() <= after.items()
        assert len(after) == len(before) + 15
        assert len({after[key] for key in after.keys() - before.keys()}) == 1


def test_a_side_on_which_nobody_is_has_no_units(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "one.png")
    for number in range(20):
        try:
            data = hospital_with(tmp_path, [("one.png", "a", f"P{number}")])
        except DataError:
            continue
        for unit in ("image", "patient"):
            assert data.train.count_units(unit) == 1
            assert data.val.count_units(unit) == 0
            assert data.val.units(unit).tolist() == []
        return
    raise AssertionError("all of twenty patients fell on the validation side")
