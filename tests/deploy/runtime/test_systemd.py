"""Nothing that a unit is made of can become a line of it, or another word."""

from __future__ import annotations

import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from client_app.hospital_file import HospitalFile, HospitalFolder
from common.errors import ConfigError
from deploy.cli import cli
from deploy.node.unit import unit as node_unit
from deploy.provision.demo import Demo, make
from deploy.provision.federation import FederationFolder, init, make_settings
from deploy.runtime import systemd
from deploy.runtime.limits import WANTED

NAMES = {"name": "x", "what": "x", "command": ("federation", "serve")}


def words(text: str) -> list[str]:
    """A line's words, as systemd.syntax(7) and systemd.service(5) have them."""
    found: list[str] = []
    inside = escaped = False
    current: str | None = None
    for character in text:
        if escaped:
            current, escaped = (current or "") + character, False
        elif character == "\\":
            escaped = True
        elif character == '"':
            inside, current = not inside, current or ""
        elif character == " " and not inside:
            if current is not None:
                found.append(current)
            current = None
        else:
            assert inside or character != "'"
            current = (current or "") + character
    assert not inside and not escaped
    return [*found, *([current] if current is not None else [])]


printable = st.text(
    st.characters(exclude_categories=["C", "Zl", "Zp", "Zs"], include_characters=" ")
)


@given(printable)
def test_every_path_that_can_be_printed_is_one_word_and_itself(text: str) -> None:
    text = f"/{text}"
    assert [word.replace("%%", "%") for word in words(systemd.path(text))] == [text]
    (word,) = words(systemd.word(text))
    assert word.replace("%%", "%").replace("$$", "$") == text
    assert "%" not in systemd.path(text).replace("%%", "")
    assert "$" not in systemd.word(text).replace("$$", "")


@given(
    st.text(), st.sampled_from("\n\r\x00\x0b\x0c\x1b\x7f\x85\u2028\u2029\u202e\ud800"), st.text()
)
def test_a_path_with_a_line_break_or_a_control_character_is_refused(
    before: str, character: str, after: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        systemd.path(f"/{before}{character}{after}")
    assert character not in refused.value.what + refused.value.remedy


@pytest.mark.parametrize("user", ["daemon", "st_mary", "a.b-c", "u@example.org", "10001"])
def test_an_accounts_name_or_number_is_taken(user: str) -> None:
    assert systemd.account(user) == user


@pytest.mark.parametrize(
    "user", ["", "root\nExecStartPre=/bin/evil2", "root\n", "a b", "-x", "%i", "$x", "a:b", "a/b"]
)
def test_anything_else_is_refused_in_two_parts(user: str) -> None:
    with pytest.raises(ConfigError, match="account") as refused:
        systemd.account(user)
    assert "\n" not in refused.value.what and "--user" in refused.value.remedy


@pytest.fixture
def hospital(tmp_path: Path) -> HospitalFolder:
    demo = Demo(hospitals=2, name="demo", address="127.0.0.1:1", hosts=["127.0.0.1"], data=None,
                images=96, image_size=16)  # fmt: skip
    return HospitalFolder(make(tmp_path / "f", demo, datetime.now(UTC).replace(microsecond=0))[0])


def test_newlines_in_a_path_or_an_accounts_name_reach_no_unit(hospital: HospitalFolder) -> None:
    file = HospitalFile.load(hospital.file)
    evil = HospitalFolder(Path("/srv/x\nExecStartPre=/bin/evil"))
    with pytest.raises(ConfigError):
        node_unit(file, evil, "daemon")
    with pytest.raises(ConfigError):
        node_unit(file, hospital, "root\nExecStartPre=/bin/evil2")
    with pytest.raises(ConfigError):
        systemd.unit(folder=Path("/x\ny"), user="daemon", **NAMES)  # type: ignore[arg-type]


def test_the_servers_unit_raises_its_limit_of_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = FederationFolder(tmp_path / "a folder")
    settings = make_settings(name="blood", address="localhost:1", hosts=[], classes=["a", "b"],
                             image_size=28, channels=3)  # fmt: skip
    init(folder, settings, datetime.now(UTC).replace(microsecond=0), days=30)
    arguments = ["federation", "service", str(folder.root), "--user"]
    done = CliRunner().invoke(cli, [*arguments, "daemon"])
    assert done.exit_code == 0 and f"LimitNOFILE={WANTED}\n" in done.output
    assert f'-m deploy.cli federation serve "{folder.root}"\n' in done.output
    assert f'ReadWritePaths="{folder.root}"\n' in done.output
    refused = CliRunner().invoke(cli, [*arguments, "root\nExecStartPre=/bin/evil2"])
    assert isinstance(refused.exception, ConfigError) and "ExecStart" not in refused.output
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed here: the unit's syntax is not checked")
    path = tmp_path / "consilium-test.service"
    path.write_text(done.output)
    checked = subprocess.run(
        ["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False
    )
    assert str(path) not in checked.stderr, checked.stderr
