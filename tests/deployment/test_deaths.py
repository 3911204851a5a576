"""What is killed with -9 comes back, and nothing is lost but the round at hand."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable

from common.files import read_json
from tests.deployment.house import House, until

Make = Callable[..., House]
ROUNDS = 5
SMALL: dict[str, object] = {
    "model_width": 0.25,
    "epsilon": 8.0,
    "quorum": 0.8,
    "stage_timeout": 20.0,
}


def begin(new_house: Make, rounds: int = ROUNDS, **more: object) -> House:
    """A federation in which the first round is done."""
    house = new_house()
    house.serve()
    house.open_all()
    house.run(rounds=rounds, **(SMALL | more))
    house.wait_for_round(1)
    return house


def missing(house: House) -> dict[int, list[str]]:
    """Round → hospitals that gave nothing."""
    found = {}
    for row in house.rounds():
        absent = sorted(set(row["expected"]) - set(row["contributed"]))
        if absent or row["status"] != "ok":
            found[row["round"]] = absent
    return found


def check_whole(house: House, rounds: int = ROUNDS) -> None:
    """As many rounds as asked, each once; every hospital's ledger is sound and adds up."""
    numbers = [row["round"] for row in house.rounds()]
    assert numbers == list(range(1, rounds + 1)), numbers
    assert all(row["status"] == "ok" for row in house.rounds())
    summary = read_json(house.runs()[-1] / "summary.json")
    assert (summary["status"], summary["rounds"]) == ("completed", rounds)
    for name in house.names:
        house.call("ledger", "verify", "--home", str(house.root / name))


def charged(house: House, name: str) -> int:
    """Rounds of training that a hospital's ledger has counted."""
    shown = json.loads(house.call("ledger", "show", "--home", str(house.root / name), "--json"))
    return sum(int(run["rounds_used"]) for run in shown["runs"])


def trained(house: House, name: str) -> int:
    """Rounds to which a hospital contributed."""
    return sum(name in row["contributed"] for row in house.rounds())


def test_a_supernode_that_is_killed_while_it_trains_joins_the_next_round(new_house: Make) -> None:
    house = begin(new_house)
    victim = house.names[2]
    house.busy(victim, 0.1)
    house.kill(house.node(victim))
    died = time.monotonic()
    until(lambda: house.said(victim).count("SuperNode ID") >= 2, "the node's return", 60)
    assert time.monotonic() - died < 30  # not the minute that the server would wait
    assert house.started.pop("run").wait(900) == 0, house.said("run")
    check_whole(house)
    lost = missing(house)
    assert len(lost) <= 1 and all(names == [victim] for names in lost.values()), lost
    assert trained(house, victim) <= charged(house, victim) <= ROUNDS


def test_a_hospital_whose_machine_dies_takes_part_again_when_it_is_back(new_house: Make) -> None:
    house = begin(new_house)
    victim = house.names[1]
    house.busy(victim, 0.1)
    assert house.end(victim, signal.SIGKILL) == -9
    until(lambda: house.app_of(victim) is None and house.process_of("deploy.node.apps", victim)
          is None, "the end of its processes", 20)  # fmt: skip
    after = len(house.rounds()) + 1
    house.wait_for_round(after, 300)
    house.open(victim)
    assert house.started.pop("run").wait(900) == 0, house.said("run")
    check_whole(house)
    assert all(names == [victim] for names in missing(house).values())
    assert victim in house.rounds()[-1]["contributed"]


def test_an_app_that_is_killed_costs_its_hospital_the_round(new_house: Make) -> None:
    house = begin(new_house, stage_timeout=90.0)
    victim = house.names[3]
    house.kill(house.busy(victim, 0.1))
    assert house.started.pop("run").wait(900) == 0, house.said("run")
    check_whole(house)
    lost = missing(house)
    assert len(lost) <= 1 and all(names == [victim] for names in lost.values()), lost


def test_a_superlink_that_is_killed_is_back_before_anybody_misses_it(new_house: Make) -> None:
    house = begin(new_house)
    house.busy(house.names[0], 0.1)
    house.kill(int(until(lambda: house.process_of("deploy.server.superlink"), "the SuperLink")))
    assert house.started.pop("run").wait(900) == 0, house.said("run")
    check_whole(house)
    assert len(missing(house)) <= 1


def test_a_server_that_is_away_for_75_s_goes_on_by_resuming(new_house: Make) -> None:
    house = begin(new_house)
    house.busy(house.names[0], 0.1)
    before = len(house.rounds())
    house.end("serve", signal.SIGKILL)
    time.sleep(75)
    house.serve()
    assert house.started.pop("run").wait(300) == 1
    run = house.runs()[-1].name
    assert f"--resume {run}" in house.said("run")
    until(lambda: all(_heard_lately(house, name) for name in house.names), "the nodes", 90)
    house.run("resumed", resume=run)
    assert house.started.pop("resumed").wait(900) == 0, house.said("resumed")
    check_whole(house)
    assert before >= 1 and len(house.runs()) == 1
    for name in house.names:
        # The round at hand may have been charged without having come to anything: never less.
        assert trained(house, name) <= charged(house, name) <= ROUNDS + 1


def _heard_lately(house: House, name: str) -> bool:
    contact = house.root / name / "node" / "contact"
    return contact.exists() and time.time() - contact.stat().st_mtime < 5


def test_a_serverapp_that_is_killed_is_resumed_to_as_many_rounds_as_asked(new_house: Make) -> None:
    house = begin(new_house)
    house.busy(house.names[0], 0.1)
    house.kill(int(until(house.serverapp, "the ServerApp")))
    assert house.started.pop("run").wait(300) == 1  # Flower notices after a minute
    run, before = house.runs()[-1].name, house.rounds()
    assert f"--resume {run}" in house.said("run")
    house.run("resumed", resume=run)
    assert house.started.pop("resumed").wait(900) == 0, house.said("resumed")
    check_whole(house)
    assert house.rounds()[: len(before)] == before or _same(before, house.rounds())
    for name in house.names:
        assert trained(house, name) <= charged(house, name) <= ROUNDS + 1


def _same(before: list[dict[str, object]], after: list[dict[str, object]]) -> bool:
    """Whether the rounds of before were kept; the last one's validation comes a round later."""
    kept = [{k: v for k, v in row.items() if k != "validation"} for row in after[: len(before)]]
    return kept == [{k: v for k, v in row.items() if k != "validation"} for row in before]


def test_a_hospital_that_is_away_for_ten_minutes_is_missed_and_comes_back(new_house: Make) -> None:
    house = begin(new_house, rounds=300)
    victim = house.names[4]
    left = time.monotonic()
    house.end(victim, signal.SIGKILL)
    while time.monotonic() - left < 600:
        assert house.started["run"].poll() is None, house.said("run")
        time.sleep(5)
    during = len(house.rounds())
    house.open(victim)
    until(lambda: victim in house.rounds()[-1]["contributed"], "its return", 180)
    assert all(row["status"] == "ok" for row in house.rounds())
    assert during > 5
    house.end("run", signal.SIGINT)  # it has shown what it should
