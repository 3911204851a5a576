"""Pictures, ledger, state and machine: each thing that is broken fails its own check."""

from __future__ import annotations

import os
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from client_app.hospital_file import HospitalFolder
from deploy.doctor import house, machine, pictures, state
from deploy.doctor.case import Case
from tests.conftest import ROOT
from tests.deploy.doctor.conftest import Ward, row, skipped, wrong
from tests.deploy.ledger.building import spoil, train

HERE = Path("policy.toml")
DEPENDENT = {"split", "patients", "delta"}


def data(ward: Ward) -> Path:
    return ward.folder.root / "data"


def test_a_folder_that_is_no_class_is_found_with_the_entry_that_maps_it(ward: Ward) -> None:
    ward.serve()
    old = sorted(data(ward).iterdir())[0]
    old.rename(old.with_name(f"Our {old.name}"))
    document = ward.check()
    assert wrong(document) == {"classes": "FAIL"}
    assert f'"Our {old.name}" = "{old.name}"' in row(document, "classes")["remedy"]
    assert set(skipped(document)) == {"pictures"} | DEPENDENT
    ward.edit(ward.folder.file, "[classes]", f'[classes]\n"Our {old.name}" = "{old.name}"')
    assert wrong(ward.check()) == {}


def test_a_mapping_to_a_class_that_is_none_is_found(ward: Ward) -> None:
    ward.serve()
    ward.edit(ward.folder.file, "[classes]", '[classes]\n"a" = "no such class"')
    document = ward.check()
    assert wrong(document) == {"classes": "FAIL"}
    assert "no such class" in row(document, "classes")["found"]


def test_a_label_of_a_manifest_that_is_no_class_is_found(ward: Ward) -> None:
    ward.serve()
    files = sorted(data(ward).rglob("*.png"))
    lines = [f"{f.relative_to(data(ward))},{f.parent.name}" for f in files]
    lines[0] = f"{files[0].relative_to(data(ward))},unheard of"
    (data(ward) / "manifest.csv").write_text("\n".join(["file,label", *lines]))
    document = ward.check()
    assert wrong(document) == {"classes": "FAIL"}
    assert '"unheard of" = ' in row(document, "classes")["remedy"]


def test_missing_pictures_are_found(ward: Ward) -> None:
    ward.serve()
    shutil.rmtree(data(ward))
    document = ward.check()
    assert wrong(document) == {"classes": "FAIL"}
    assert "[data] folder" in row(document, "classes")["remedy"]


def test_unreadable_pictures_are_counted_and_the_first_three_named(ward: Ward) -> None:
    ward.serve()
    spoilt = sorted(data(ward).rglob("*.png"))[3:8]
    for path in spoilt:
        path.write_bytes(path.read_bytes()[:60])
    document = ward.check()
    assert wrong(document) == {"pictures": "FAIL"}
    found = row(document, "pictures")["found"]
    assert found.startswith("5 picture(s)") and "and 2 more" in found
    assert sum(str(path) in found for path in spoilt) == 3
    assert set(skipped(document)) == DEPENDENT


def test_a_class_without_pictures_is_a_warning_and_copies_are_a_note(ward: Ward) -> None:
    ward.serve()
    first, second = sorted(data(ward).iterdir())[:2]
    shutil.rmtree(first)
    picture = sorted(second.glob("*.png"))[0]
    shutil.copy(picture, picture.with_name("again.png"))
    document = ward.check()
    assert wrong(document) == {"pictures": "WARN"}
    found = row(document, "pictures")["found"]
    assert f"none of: {first.name}" in found and "1 of them repeat another one" in found


def test_too_few_pictures_for_both_sides_are_found(ward: Ward) -> None:
    ward.serve()
    kept = sorted(data(ward).rglob("*.png"))[:3]
    for path in set(data(ward).rglob("*.png")) - set(kept):
        path.unlink()
    for folder in data(ward).iterdir():
        if not any(folder.iterdir()):
            folder.rmdir()
    document = ward.check()
    assert wrong(document) == {"pictures": "WARN", "split": "FAIL"}
    assert "add pictures" in row(document, "split")["remedy"]


def test_a_policy_for_patients_needs_to_know_them(ward: Ward) -> None:
    ward.serve()
    ward.edit(ward.folder.policy, 'unit = "image"', 'unit = "patient"')
    document = ward.check()
    assert wrong(document) == {"patients": "FAIL"}
    assert "manifest.csv" in row(document, "patients")["remedy"]
    for number, path in enumerate(sorted(data(ward).rglob("*.png"))):
        (path.parent / f"patient-{number % 7}").mkdir(exist_ok=True)
        path.rename(path.parent / f"patient-{number % 7}" / path.name)
    document = ward.check()
    assert wrong(document) == {}
    assert "below 1/7 (patients)" in row(document, "delta")["found"]


def test_a_picture_of_two_patients_is_a_warning_with_what_it_does_to_the_figures(
    ward: Ward,
) -> None:
    ward.edit(ward.folder.policy, 'unit = "image"', 'unit = "patient"')
    root = data(ward)
    pictures = [path.relative_to(root) for path in sorted(root.rglob("*.png"))]
    rows = [f"{path},{path.parts[0]},P{n}" for n, path in enumerate(pictures)]
    copy = root / "copy.png"
    copy.write_bytes((root / pictures[0]).read_bytes())
    found = set()
    for other in range(20):
        table = ["file,label,patient", *rows, f"copy.png,{pictures[0].parts[0]},Q{other}"]
        (root / "manifest.csv").write_text("\n".join(table) + "\n")
        told = row(ward.check(), "patients")
        assert told["status"] == "WARN"
        assert "name one patient for each picture" in told["remedy"]
        found.add(told["found"].partition("policy")[2])
        if len(found) == 2:
            break
    one = "'s privacy unit is the patient; 1 picture(s) are another patient's too"
    assert found == {one, f"{one}, 1 of them on both sides (validation figures too good)"}


@given(st.integers(1, 10**7), st.floats(1e-9, 0.01))
def test_delta_is_a_warning_exactly_where_it_is_not_below_one_over_n(n: int, value: float) -> None:
    finding = pictures.judge_delta(value, n, "image", HERE)
    assert finding.status == ("PASS" if value * n < 1 else "WARN")


def test_a_delta_that_is_too_large_for_the_pictures_is_a_warning(ward: Ward) -> None:
    ward.serve()
    for number in range(40):  # with some 90 pictures more than 1/0.0099
        path = sorted(data(ward).iterdir())[number % 3] / f"more-{number}.png"
        _picture(number).save(path)
    ward.edit(ward.folder.policy, "total-delta = 0.0002", "total-delta = 0.0099")
    document = ward.check()
    assert wrong(document) == {"delta": "WARN"}
    assert "total-delta" in row(document, "delta")["remedy"]


def _picture(number: int) -> Image.Image:
    return Image.new("RGB", (28, 28), (number, 2 * number, 255 - number))


def test_a_ledger_is_verified_and_what_is_left_is_told(ward: Ward) -> None:
    ward.serve()
    train(ward.folder.root / "ledger.sqlite")
    document = ward.check()
    assert wrong(document) == {}
    assert row(document, "ledger")["found"].startswith("sound:")
    assert "left" in row(document, "budget")["found"]
    ward.edit(ward.folder.policy, "total-epsilon = 8.0", "total-epsilon = 3.1")
    document = ward.check()
    assert wrong(document) == {"budget": "WARN"}
    assert "ledger show" in row(document, "budget")["remedy"]


def test_a_damaged_ledger_is_found(ward: Ward) -> None:
    ward.serve()
    path = ward.folder.root / "ledger.sqlite"
    train(path)
    spoil(path, "UPDATE entries SET noise_multiplier = 9.0 WHERE kind = 'reserve'")
    document = ward.check()
    assert wrong(document) == {"ledger": "FAIL"}
    assert "damaged" in row(document, "ledger")["found"]
    assert "backup" in row(document, "ledger")["remedy"]
    assert skipped(document) == {"budget": "ledger"}


def test_a_ledger_that_is_gone_and_one_with_a_change_half_done_are_found(ward: Ward) -> None:
    ward.serve()
    path = ward.folder.root / "ledger.sqlite"
    train(path)
    journal = path.with_name("ledger.sqlite-journal")
    journal.write_bytes(b"half")
    document = ward.check()
    assert wrong(document) == {"ledger": "WARN"} and skipped(document) == {"budget": "ledger"}
    assert journal.read_bytes() == b"half"
    journal.unlink()
    path.unlink()
    document = ward.check()
    assert wrong(document) == {"ledger": "FAIL"}
    assert "gone" in row(document, "ledger")["found"]
    assert not path.exists()


def test_an_egress_log_that_cannot_be_written_is_found(ward: Ward) -> None:
    ward.serve()
    (ward.folder.root / "egress.tsv").mkdir(0o700)
    document = ward.check()
    assert wrong(document) == {"egress log": "FAIL"}
    assert "permissions" in row(document, "egress log")["remedy"]


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user to whom permissions apply."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_that_cannot_be_written_is_found_and_nothing_is_left_where_it_can() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        case = Case(HospitalFolder(place), datetime.now(UTC))
        before = place.stat().st_mtime_ns
        assert state.writable(case).status == "PASS"
        assert list(place.iterdir()) == [] and place.stat().st_mtime_ns == before
        place.chmod(0o555)
        with unprivileged():
            finding = state.writable(case)
        place.chmod(0o755)
    assert finding.status == "FAIL" and "owner and permissions" in finding.remedy


def test_a_proxy_that_flower_would_use_is_a_warning(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    ward.serve()
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:3128")
    assert wrong(ward.check()) == {}  # not for https
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:3128")
    document = ward.check()
    assert wrong(document) == {"proxy": "WARN"}
    assert "NO_PROXY=localhost" in row(document, "proxy")["remedy"]
    monkeypatch.setenv("NO_PROXY", "localhost")
    assert wrong(ward.check()) == {}


def test_the_proxies_that_are_told_are_those_that_httpx_goes_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for variables in ({}, {"HTTP_PROXY": "x"}, {"HTTPS_PROXY": "x"}, {"all_proxy": "x"},
                      {"HTTPS_PROXY": "x", "NO_PROXY": "fed.example"}):  # fmt: skip
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, "http://proxy.invalid:1" if value == "x" else value)
            with httpx.Client() as client:
                transport = client._transport_for_url(httpx.URL("https://fed.example:9092"))
                direct = transport is client._transport
            found = machine.judge_proxies(machine.getproxies_environment(), "fed.example")
        assert (found.status == "PASS") == direct, variables


@pytest.mark.parametrize(
    ("free", "status"), [(10**8, "FAIL"), (10**9, "WARN"), (2 * 10**9, "PASS")]
)
def test_little_room_on_the_disk_is_told(free: int, status: str) -> None:
    assert machine.judge_disk(free, HERE).status == status


@pytest.mark.parametrize(("free", "status"), [(None, "WARN"), (10**9, "WARN"), (10**10, "PASS")])
def test_little_memory_is_told(free: int | None, status: str) -> None:
    assert machine.judge_memory(free).status == status


@pytest.mark.parametrize(
    ("used", "fitted", "status"),
    [("", [], "PASS"), ("NVIDIA H200", ["nvidia0"], "PASS"), ("", ["nvidia0"], "WARN")],
)
def test_a_gpu_that_training_does_not_see_is_told(
    used: str, fitted: list[str], status: str
) -> None:
    found = machine.judge_gpu(used, fitted)
    assert found.status == status
    assert (used or "the processor") in found.found


def test_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = " ".join(project["dependencies"])
    assert f"flwr[simulation]=={machine.REQUIRED['flwr']}" in asked
    assert f"torch=={machine.REQUIRED['torch']}.*" in asked
    assert f"opacus>={machine.REQUIRED['opacus']},<1.7" in asked
    low, high = (".".join(map(str, version)) for version in machine.PYTHON)
    assert project["requires-python"] == f">={low},<{high}"


@pytest.mark.parametrize(
    ("python", "changed", "status"),
    [
        ((3, 11, 7), {}, "PASS"),
        ((3, 13, 0), {}, "FAIL"),
        ((3, 11, 7), {"flwr": "1.41.1"}, "FAIL"),
        ((3, 11, 7), {"torch": "2.130.0"}, "FAIL"),
        ((3, 11, 7), {"opacus": ""}, "FAIL"),
    ],
)
def test_another_version_is_found(
    python: tuple[int, ...], changed: dict[str, str], status: str
) -> None:
    found = {"flwr": "1.41.0", "torch": "2.13.0+cpu", "opacus": "1.6.1"} | changed
    assert machine.judge_versions(python, found).status == status


def test_a_folder_that_only_another_user_may_enter_is_told_from_one_that_is_no_hospitals() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "hospital.toml").touch()
        place.chmod(0o700 if os.geteuid() == 0 else 0)
        with unprivileged():
            finding = house.folder(Case(HospitalFolder(place), datetime.now(UTC)))
        place.chmod(0o700)
    assert finding.status == "FAIL" and "may not enter" in finding.found
