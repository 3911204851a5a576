"""What is refused before anything starts, in two parts."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path

import pytest

from common.errors import ConfigError
from deploy.provision import federation, keys
from deploy.runtime.ports import free_port
from deploy.server import preflight
from deploy.server.layout import ServerFolder, find, only_server, remember
from tests.deploy.server.conftest import Federation, now


@pytest.fixture
def made(tmp_path: Path) -> Federation:
    return Federation(tmp_path, free_port())


def refused(made: Federation, days: int = 0) -> str:
    with pytest.raises(ConfigError) as error:
        preflight.check(made.folder, now() + timedelta(days=days))
    assert error.value.remedy
    return error.value.what


def test_a_sound_folder_passes_and_an_end_near_is_told(made: Federation) -> None:
    federation.renew(made.folder, now(), days=90)
    assert preflight.check(made.folder, now()) == []
    (warning,) = preflight.check(made.folder, now() + timedelta(days=80))
    assert "renew" in warning


def test_serving_needs_neither_the_authoritys_nor_the_coordinators_private_key(
    made: Federation,
) -> None:
    made.folder.authority_key.unlink()
    made.folder.coordinator_key.unlink()
    preflight.check(made.folder, now())


def test_a_certificate_that_ended_or_is_missing_is_refused(made: Federation) -> None:
    assert "not today" in refused(made, days=31)
    made.folder.server.unlink()
    assert "tls.crt" in refused(made)


def test_a_certificate_and_a_key_that_do_not_belong_together_are_refused(made: Federation) -> None:
    made.folder.server_key.write_bytes(keys.new_tls_key())
    assert "is not the key of" in refused(made)


def test_a_certificate_of_another_authority_or_for_another_name_is_refused(
    made: Federation, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = Federation(tmp_path / "other", free_port())
    kept = made.folder.authority.read_bytes()
    made.folder.authority.write_bytes(other.folder.authority.read_bytes())
    assert "not of the authority" in refused(made)
    made.folder.authority.write_bytes(kept)
    text = made.folder.settings.read_text()
    made.folder.settings.write_text(text.replace("localhost:", "elsewhere.example:"))
    assert "not for elsewhere.example" in refused(made)


@pytest.mark.parametrize("name", ["server_key", "authority_key", "coordinator_key"])
def test_a_private_key_that_others_may_read_is_refused(made: Federation, name: str) -> None:
    getattr(made.folder, name).chmod(0o640)
    assert "others than its owner may read" in refused(made)


def test_a_port_in_use_and_a_host_that_is_none_are_refused() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        pytest.raises(ConfigError, match="cannot listen"),
    ):
        preflight.check_free("127.0.0.1", listening.getsockname()[1])
    with pytest.raises(ConfigError, match="no IP address"):
        preflight.check_free("localhost", 1)


def test_a_folder_is_served_once_at_a_time(made: Federation) -> None:
    folder = ServerFolder(made.folder.root)
    folder.state.mkdir()
    with (
        only_server(folder),
        pytest.raises(ConfigError, match="already"),
        only_server(folder),
    ):
        pass
    with only_server(folder):
        pass


def test_a_federation_is_found_by_its_folder_and_by_the_name_it_was_served_under(
    made: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = made.folder.root.resolve()
    monkeypatch.chdir(root.parent)
    assert find("fed") == find(str(root)) == root
    with pytest.raises(ConfigError, match="neither"):
        find("blood")
    remember("blood", root)
    assert find("blood") == root
