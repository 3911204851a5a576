"""Five hospitals in processes of their own: TLS, node authentication, SecAgg+ and DP."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common.files import read_json
from deploy.server.launch import APP
from tests.deployment.house import REAL, House, processes, until

Make = Callable[..., House]
SMALL: dict[str, object] = {"model_width": 0.25, "epsilon": 8.0, "quorum": 1.0}


def test_five_hospitals_train_privately_and_securely_over_tls(new_house: Make) -> None:
    house = new_house(real=REAL.exists())
    house.serve()
    house.open_all()
    run = house.run(rounds=3, **SMALL)
    assert run.wait(600) == 0, house.said("run")
    rounds = house.rounds()
    assert [row["round"] for row in rounds] == [1, 2, 3]
    assert all(row["contributed"] == house.names and not row["dropped"] for row in rounds)
    directory = house.runs()[-1]
    summary = read_json(directory / "summary.json")
    assert summary["status"] == "completed" and summary["secagg"] is True
    config = read_json(directory / "config.json")
    assert config["roster"] and config["coordinator-key"]  # so hospitals are authenticated
    for name in house.names:
        folder = house.hospital(name)
        house.call("ledger", "verify", "--home", str(folder.root))
        with (folder.root / "egress.tsv").open() as file:
            stages = {row["message"] for row in csv.DictReader(file, delimiter="\t")}
        assert {"greet", "train", "masked", "unmask"} <= stages
        house.call("hospital", "health", str(folder.root))
        assert "UNAUTHENTICATED" not in house.said(name)
    assert house.end("serve") == 0
    assert all(house.end(name) == 0 for name in house.names)
    assert not [w for _, w in processes().values() if any(str(house.root) in part for part in w)]
    _no_secret_is_told(house)


def _no_secret_is_told(house: House) -> None:
    """Neither logs, nor outputs, nor anything that the coordinator holds has a hospital's key."""
    secrets = []
    for name in house.names:
        folder = house.hospital(name)
        secrets.append(folder.identity_key.read_bytes())
        secrets.append(folder.node_key.read_bytes())
    secrets.append(house.coordinator.coordinator_key.read_bytes())
    secrets.append(house.coordinator.authority_key.read_bytes())
    logs = [*house.root.glob("*.out"), *house.root.rglob("*.log"), *house.root.rglob("*.log.*")]
    assert len(logs) > 10
    told = b"".join(path.read_bytes() for path in logs)
    held = b"".join(
        path.read_bytes()
        for place in (house.coordinator.root / "state", house.coordinator.root / "home")
        for path in place.rglob("*")
        if path.is_file()
    )
    for secret in secrets:
        for form in (secret, secret.hex().encode()):
            assert form not in told
            assert form not in held
    for secret_file in house.root.glob("hospital-*/node/secret"):
        assert secret_file.read_bytes().strip() not in told


def test_a_hospital_admitted_later_joins_and_the_others_need_no_kit_by_hand(
    new_house: Make,
) -> None:
    house, newcomer = new_house(), "hospital-99"
    house.serve()
    house.open_all()
    until(lambda: all(map(house.is_connected, house.names)), "the first five")
    before = house.names
    place = house.root / newcomer
    house.call("hospital", "init", str(place), "--name", newcomer)
    (place / "data").symlink_to(house.root / before[0] / "data")
    request = json.loads((place / "request.json").read_text())
    admit = ["federation", "admit", str(house.coordinator.root), str(place / "request.json")]
    shown = house.call(*admit, "--fingerprint", "0" * 32, status=1)
    fingerprint = shown.split("fingerprint of the request: ")[1].split()[0]
    house.call(*admit, "--fingerprint", fingerprint)
    key = house.call("federation", "status", str(house.coordinator.root), "--json")
    house.call("hospital", "join", str(place), str(house.coordinator.kits / newcomer),
               "--fingerprint", json.loads(key)["coordinator"]["fingerprint"])  # fmt: skip
    house.open(newcomer)
    until(lambda: house.is_connected(newcomer), "the newcomer")
    for name in before:
        until(partial(house.has_said, name, f"{newcomer} has joined"), f"{name}'s kit")
        assert f"members {house.root / name} --accept {newcomer}" in house.said(name)
    # Nobody has accepted it: each of the five refuses a cohort that it is in.
    run = house.run(rounds=1, **SMALL)
    assert run.wait(600) == 1, house.said("run")
    assert house.said("run").count("secagg-members") >= len(before)
    house.started.pop("run")
    told = json.loads(house.call("hospital", "members", str(place), "--json"))["members"]
    (own,) = (row for row in told if row["state"] == "this hospital")
    for name in before:
        house.call("hospital", "members", str(house.root / name), "--accept",
                   f"{newcomer}={own['fingerprint']}")  # fmt: skip
    run = house.run("again", rounds=1, **SMALL)
    assert run.wait(600) == 0, house.said("again")
    assert house.rounds()[0]["contributed"] == [*before, newcomer]
    assert request["name"] == newcomer


def test_a_failed_run_ends_with_an_error_and_says_how_to_go_on(new_house: Make) -> None:
    house = new_house()
    house.serve()
    house.open_all()
    until(lambda: all(map(house.is_connected, house.names)), "all")
    policy = house.hospital(house.names[0]).policy
    policy.write_text(policy.read_text().replace("run-epsilon = 8.0", "run-epsilon = 0.5"))
    run = house.run(rounds=4, **SMALL)  # asks for more than that hospital gives, and for everybody
    assert run.wait(600) == 1
    said = house.said("run")
    assert "privacy-policy" in said and house.names[0] in said
    assert "--resume" in said


def test_a_run_on_another_app_than_the_installed_one_trains_nowhere(
    new_house: Make, tmp_path: Path
) -> None:
    house = new_house()
    installed, modified = house.directory, tmp_path / "modified"
    _copy_of_the_app(modified)
    path = modified / "client_app" / "work.py"
    path.write_text(path.read_text() + "\n# one line more\n")
    house.directory = modified  # the coordinator's copy, its server's too, not the hospitals'
    house.serve()
    house.directory = installed
    house.open_all()
    until(lambda: all(map(house.is_connected, house.names)), "all")
    # A server of one copy runs no other, wherever the run was started.
    run = house.run("refused", rounds=1, **SMALL)
    assert run.wait(300) == 1, house.said("refused")
    assert "not the one that is installed at the server" in house.said("refused")
    assert "refused a run" in house.said("serve") and not house.runs()
    house.directory = modified
    run = house.run(rounds=2, connect_timeout=20, **SMALL)
    assert run.wait(300) == 1, house.said("run")
    assert "it did not load the app" in house.said("run")
    for name in house.names:
        assert "client_app/work.py" in house.said(name)
        assert not (house.root / name / "node" / "flower" / "apps").exists()  # nothing unpacked
        ledger = house.root / name / "ledger.sqlite"
        assert not ledger.exists()  # so nothing was charged, and nothing trained


def _copy_of_the_app(target: Path) -> None:
    for name in ("common", "client_app", "server_app", "deploy"):
        shutil.copytree(APP / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(APP / name, target / name)
