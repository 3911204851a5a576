"""Settings, descriptions and hospital files are read strictly and written so that they are read."""

from __future__ import annotations

import string
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from client_app.hospital_file import HospitalFile
from client_app.policy import HospitalPolicy
from common.datasets import load_folder_as_one
from common.errors import ConfigError
from common.federation_file import FederationFile, split_address
from common.secagg import Identity
from deploy.provision.federation import FederationFolder, Settings
from deploy.provision.samples import hospital_toml, policy_toml
from tests.deploy.provision.conftest import CLASSES, settings

SIGNER = Identity(bytes(range(32)))
NAMES = st.text(string.ascii_letters + string.digits, min_size=1, max_size=20)
LABELS = st.text(min_size=1, max_size=20).filter(
    lambda s: s.isprintable() and s == s.strip() and not s.startswith(".") and "/" not in s
)


@given(NAMES, st.lists(LABELS, min_size=2, max_size=9, unique=True), st.sampled_from([1, 3]))
def test_settings_survive_their_file(name: str, classes: list[str], channels: int) -> None:
    made = settings(name=name, classes=classes, channels=channels)
    assert Settings.read(tomllib.loads(made.to_toml()), "x") == made


@given(
    NAMES,
    st.lists(LABELS, min_size=2, max_size=9, unique=True),
    st.binary(min_size=32, max_size=32),
)
def test_a_description_survives_its_file(name: str, classes: list[str], digest: bytes) -> None:
    made = FederationFile(
        settings(name=name, classes=classes).description(), digest, digest, "2026-03-01T12:00:00Z"
    )
    assert FederationFile.load(made.sign(SIGNER), SIGNER.public) == made


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""}, {"name": "a/b"}, {"name": "x" * 65}, {"classes": ("one",)}, {"classes": ()},
        {"classes": ("a", "a")}, {"classes": ("a", "")}, {"classes": ("a", " b")},
        {"classes": ("a", "b/c")}, {"classes": ("a", "..")}, {"classes": ("a", "b\n")},
        {"image_size": 8}, {"image_size": 1024}, {"channels": 2}, {"address": "localhost"},
        {"address": "localhost:0"}, {"address": "localhost:70000"}, {"address": ":9092"},
        {"address": "https://x:1"}, {"address": "::1:9092"}, {"address": "[x]:1"},
        {"hosts": ("*.example.org",)}, {"hosts": ("a b",)}, {"hosts": ("fe80::1%eth0",)},
        {"hosts": ("1.2.3",)}, {"hosts": ("",)},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change)).replace("_", "-")) as error:
        settings(**change)
    assert error.value.remedy


@pytest.mark.parametrize(
    "text",
    ["", "version = 2", "not toml =", settings().to_toml() + "extra = 1\n",
     settings().to_toml().replace("image-size = 28", 'image-size = "28"'),
     settings().to_toml().replace("image-size", "image_size"),
     settings().to_toml().replace("channels = 3", "channels = true")],
)  # fmt: skip
def test_a_federation_file_that_is_wrong_anywhere_is_no_federation(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "federation.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"federation\.toml"):
        FederationFolder(tmp_path).load()


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("localhost:9092", "localhost", 9092), ("127.0.0.1:1", "127.0.0.1", 1),
     ("[::1]:443", "::1", 443), ("FL.example.org:65535", "fl.example.org", 65535)],
)  # fmt: skip
def test_addresses_are_read_as_flower_reads_them(address: str, host: str, port: int) -> None:
    from flwr.supercore.address import parse_address

    assert split_address(address) == (host, port)
    theirs = parse_address(address)
    assert theirs is not None and (theirs[0].lower(), theirs[1]) == (host, port)


def load(tmp_path: Path, text: str) -> HospitalFile:
    (tmp_path / "hospital.toml").write_text(text)
    return HospitalFile.load(tmp_path / "hospital.toml")


def test_the_sample_is_a_hospital_file(tmp_path: Path) -> None:
    file = load(tmp_path, hospital_toml("st-mary", "data"))
    assert file == HospitalFile(name="st-mary", folder=tmp_path / "data")


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    text = 'version = 1\nname = "a"\n[data]\nfolder = "/pictures"\nmanifest = "tables/m.csv"\n'
    file = load(tmp_path, text)
    assert (file.folder, file.manifest) == (Path("/pictures"), tmp_path / "tables" / "m.csv")


@pytest.mark.parametrize(
    "text",
    [
        "", "not toml =", 'version = 1\nname = "a"', 'version = 1\nname = "a"\n[data]\nfolder = ""',
        'version = 1\nname = "a/b"\n[data]\nfolder = "x"', 'name = "a"\n[data]\nfolder = "x"',
        'version = 1\nname = "a"\n[data]\nfolder = "x"\ncrop = -1',
        'version = 1\nname = "a"\n[data]\nfolder = "x"\ncrop = "0"',
        'version = 1\nname = "a"\n[data]\nfolder = "x"\nmanifset = "y"',
        'version = 1\nname = "a"\n[data]\nfolder = "x"\n[server]\naddress = "nowhere"',
        'version = 1\nname = "a"\n[data]\nfolder = "x"\n[classes]\n"n" = 3',
    ],
)  # fmt: skip
def test_a_hospital_file_that_is_wrong_anywhere_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"hospital\.toml"):
        load(tmp_path, text)


def test_own_class_names_become_the_federations_labels(tmp_path: Path) -> None:
    text = hospital_toml("a", "data")
    mapping = '[classes]\n"segmented" = "neutrophil"\n"banded" = "neutrophil"'
    file = load(tmp_path, text.replace("[classes]", mapping))
    places = ("segmented", "banded", "platelet", "neutrophil")
    for shade, place in enumerate(places):
        (tmp_path / "data" / place).mkdir(parents=True)
        Image.new("RGB", (20, 20), (50 * shade, 0, 0)).save(tmp_path / "data" / place / "1.png")
    names, numbers = file.own_classes(CLASSES)
    images, _, _ = load_folder_as_one(file.folder, names, image_size=20)
    found = {
        int(shade): int(label)
        for shade, label in zip(
            images.images[:, 0, 0, 0] // 50, np.array(numbers)[images.labels], strict=True
        )
    }
    assert found == {0: 0, 1: 0, 2: 2, 3: 0}


def test_a_class_that_the_federation_does_not_have_is_refused() -> None:
    file = HospitalFile(name="a", folder=Path("data"), classes={"x": "basophil"})
    with pytest.raises(ConfigError, match="no class of the federation"):
        file.own_classes(CLASSES)


def test_the_sample_policy_says_every_default_aloud(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(policy_toml())
    assert HospitalPolicy.load(path) == HospitalPolicy()
    from client_app.policy import Aggregation, Privacy

    for table, model in (("aggregation", Aggregation()), ("privacy", Privacy())):
        assert tomllib.loads(policy_toml())[table] == model.model_dump(by_alias=True)
    entries = [line for line in policy_toml().splitlines() if " = " in line and line[0] != "#"]
    assert all("#" in line for line in entries if not line.startswith("version"))
