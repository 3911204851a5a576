"""Names are proved: whoever greets first takes nobody's place, whatever it says, signs or repeats.

Real hospitals' answers over the in-process grid; one of them, enrolled, is malicious.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from client_app.app import app
from common.config import KEYS
from common.files import write_json
from common.messages import WIRE, Challenge, Greeting, Refusal, Wire
from common.secagg import Identity, Roster, RosterEntry
from common.secagg.keys import verify
from deploy.inprocess import Fault, InProcessGrid
from server_app.directory import NODES, Directory
from tests.golden.fixed import FOLDER, identity
from tests.golden.records import from_bytes

N = 5
VALUES: dict[str, Any] = {key.name: key.default for key in KEYS} | {
    "dataset": "synthetic", "synthetic-size": 400, "privacy": "none",
}  # fmt: skip
NAMES = [f"hospital-{i:02d}" for i in range(N)]
KEYS_OF = {name: identity(name) for name in NAMES}
ROSTER = {name: key.public for name, key in KEYS_OF.items()}
VICTIM = 2

Lie = Callable[["Members", Message, Context], Greeting | RecordDict]


class Members(InProcessGrid):
    """Enrolled hospitals; what ``liar`` (a partition id) answers to a greeting ``lie`` says."""

    def __init__(self, folder: Path, liar: int | None = None, lie: Lie | None = None) -> None:
        nodes = {}
        for i, name in enumerate(NAMES):
            file = folder / f"{name}.key"
            file.write_bytes(KEYS_OF[name].private_bytes())
            nodes[i] = {"identity": str(file)}
        self.greetings: list[RecordDict] = []
        """What the victim has answered so far: its neighbour on the wire has seen it."""

        def answer(message: Message, context: Context) -> Message:
            who = context.node_config["partition-id"]
            if message.metadata.message_type != "query.greet":
                return app(message, context)
            if who == liar and lie is not None:
                found = lie(self, message, context)
                record = found if isinstance(found, RecordDict) else found.to_record()
                return Message(record, reply_to=message)
            reply = app(message, context)
            if who == VICTIM:
                self.greetings.append(reply.content)
            return reply

        super().__init__(answer, N, dict(VALUES), node_configs=nodes)  # type: ignore[arg-type]


def asked(message: Message) -> Challenge:
    challenge = Challenge.in_record(message.content)
    assert challenge is not None
    return challenge


def unsigned(grid: Members, message: Message, context: Context) -> Greeting:
    return Greeting(NAMES[VICTIM])


def signed_by_itself(grid: Members, message: Message, context: Context) -> Greeting:
    own = KEYS_OF[NAMES[int(context.node_config["partition-id"])]]
    return Greeting.signed(
        NAMES[VICTIM], own, asked(message), run=context.run_id, node=context.node_id
    )


def repeated(grid: Members, message: Message, context: Context) -> RecordDict:
    return grid.greetings[-1] if grid.greetings else unsigned(grid, message, context).to_record()


def relayed(grid: Members, message: Message, context: Context) -> RecordDict:
    """The victim is made to answer the very question that the liar was asked, at its own node."""
    other = grid.contexts[VICTIM]
    question = Message(message.content, other.node_id, "query.greet")
    return app(question, other).content


def garbage(grid: Members, message: Message, context: Context) -> RecordDict:
    return RecordDict()


LIES = [unsigned, signed_by_itself, repeated, relayed]


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("liar", [0, N - 1])  # greeted before the victim, and after it
@pytest.mark.parametrize("late", [False, True])
def test_a_member_that_greets_under_anothers_name_takes_nobodys_place(
    lie: Lie, liar: int, late: bool, tmp_path: Path
) -> None:
    grid = Members(tmp_path, liar, lie)
    directory = Directory(grid, members=NAMES, roster=ROSTER)
    if late:  # the liar is there first, and the victim comes later
        grid.offline.add(VICTIM)
        directory.refresh()
        grid.offline.clear()
    else:
        directory.refresh()
        grid.greetings and directory.refresh()  # what was said once is repeated
    absent = directory.refresh()
    there, missing = directory.reach(NAMES)
    assert there[NAMES[VICTIM]] == 1000 + VICTIM
    assert missing == [NAMES[liar]]
    assert set(there.values()) == {1000 + i for i in range(N) if i != liar}
    (one,) = absent
    assert (one.hospital, one.stage) == (f"node {1000 + liar}", "greet")
    assert NAMES[VICTIM] in one.reason and "sign" in one.reason
    assert directory.left_out == absent


def test_an_old_greeting_of_its_own_holds_for_no_new_question(tmp_path: Path) -> None:
    """Who has recorded a hospital's greeting cannot be that hospital, not even at its node."""
    grid = Members(tmp_path, VICTIM, lambda g, m, c: g.greetings[0])
    challenge = Challenge.new()
    honest = app(
        Message(challenge.to_record(), 1000 + VICTIM, "query.greet"), grid.contexts[VICTIM]
    ).content
    grid.greetings.append(honest)
    (absent,) = Directory(grid, roster=ROSTER).refresh()
    assert "repeats an old greeting" in absent.reason


@given(
    change=st.sampled_from(("nonce", "run", "node", "hospital", "wire", "oldest", "package")),
    number=st.integers(1, 1 << 62),
)
def test_a_proof_holds_for_one_question_one_node_one_run_and_what_it_says(
    change: str, number: int
) -> None:
    from dataclasses import replace

    key, challenge, run, node = identity("st-mary"), Challenge(bytes(32)), 5, 7
    made = Greeting.signed("st-mary", key, challenge, run=run, node=node)
    assert made.proves(key.public, challenge, run=run, node=node)
    assert not made.proves(identity("st-paul").public, challenge, run=run, node=node)
    other = {
        "hospital": "st-paul", "wire": Wire(WIRE.major, WIRE.minor + 1), "oldest": 1,
        "package": "0",
    }.get(change)  # fmt: skip
    altered = made if other is None else replace(made, **{change: other})
    if change == "nonce":
        challenge = Challenge(number.to_bytes(32, "big"))
    run, node = run + number * (change == "run"), node + number * (change == "node")
    assert not altered.proves(key.public, challenge, run=run, node=node)


def test_a_hospital_that_is_not_on_the_roster_is_left_out_by_name(tmp_path: Path) -> None:
    known = {name: key for name, key in ROSTER.items() if name != NAMES[1]}
    directory = Directory(Members(tmp_path), roster=known)
    (absent,) = directory.refresh()
    assert f"'{NAMES[1]}', who is not on the roster" in absent.reason
    assert NAMES[1] not in directory.names


def test_who_has_stolen_a_key_but_not_the_node_is_not_that_hospital(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registrar knows each node by its own key, which Flower has checked."""

    def stolen(grid: Members, message: Message, context: Context) -> Greeting:
        key = KEYS_OF[NAMES[VICTIM]]
        return Greeting.signed(
            NAMES[VICTIM], key, asked(message), run=context.run_id, node=context.node_id
        )

    rows = {name: {"node-id": str(1000 + i), "key": "k"} for i, name in enumerate(NAMES)}
    write_json(tmp_path / "nodes.json", {"version": 1, "nodes": rows})
    monkeypatch.setenv(NODES, str(tmp_path / "nodes.json"))
    directory = Directory(Members(tmp_path, 0, stolen), roster=ROSTER)
    (absent,) = directory.refresh()
    assert f"this node is {NAMES[0]}'s" in absent.reason
    assert directory.reach(NAMES)[0][NAMES[VICTIM]] == 1000 + VICTIM
    # A table of which the liar is missing does not help it either.
    del rows[NAMES[0]]
    write_json(tmp_path / "nodes.json", {"version": 1, "nodes": rows})
    (absent,) = directory.refresh()
    assert "the registrar knows at another node" in absent.reason
    # One that cannot be read says nothing: the key alone decides, and the first is not displaced.
    (tmp_path / "nodes.json").write_text("[1")
    (absent,) = directory.refresh()
    assert "is in use at nodes 1000, 1002" in absent.reason
    assert directory.reach(NAMES)[0][NAMES[VICTIM]] == 1000 + VICTIM


def test_without_a_roster_neither_of_two_nodes_with_one_name_wins_and_both_are_reported(
    tmp_path: Path,
) -> None:
    grid = Members(tmp_path, 0, unsigned)
    grid.offline.add(VICTIM)
    directory = Directory(grid)
    assert directory.refresh() == []
    assert directory.reach(NAMES)[0][NAMES[VICTIM]] == 1000
    grid.offline.clear()  # now the real one comes
    for _ in range(2):
        absent = directory.refresh()
        assert [a.hospital for a in absent] == ["node 1000", f"node {1000 + VICTIM}"]
        assert all("none of them is believed" in a.reason for a in absent)
        assert NAMES[VICTIM] not in directory.reach(NAMES)[0]
    grid.offline.add(0)
    assert directory.refresh() == []
    assert directory.reach(NAMES)[0][NAMES[VICTIM]] == 1000 + VICTIM


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (WIRE.major + 1, f"speaks wire {WIRE.major + 1}, this server {WIRE}: update consilium at "
         "this server"),
        (WIRE.major - 1, f"speaks wire {WIRE.major - 1}, this server {WIRE}: update consilium at"),
    ],
)  # fmt: skip
def test_a_hospital_of_another_major_version_is_left_out_with_who_must_update(
    version: int, reason: str, tmp_path: Path
) -> None:
    def other(grid: Members, message: Message, context: Context) -> RecordDict:
        from dataclasses import replace

        plain = Greeting(NAMES[0], "9.0", wire=Wire(version, 0), oldest=version)
        statement = plain._statement(asked(message).nonce, context.run_id, context.node_id)
        record = replace(plain, proof=KEYS_OF[NAMES[0]].sign(statement)).to_record()
        record.config_records["greeting"]["version"] = version
        return record

    (absent,) = Directory(Members(tmp_path, 0, other), roster=ROSTER).refresh()
    assert absent.reason.startswith(f"{NAMES[0]} {reason}")


def test_a_hospital_of_the_release_before_is_left_out_with_a_clear_reason(tmp_path: Path) -> None:
    old = from_bytes((FOLDER / "wire" / "3" / "greeting.pb").read_bytes())
    (absent,) = Directory(Members(tmp_path, 0, lambda *_: old), roster=ROSTER).refresh()
    who = "node 1000, which says that it is st-mary,"
    assert absent.reason == (f"{who} speaks wire 3, this server {WIRE}: update consilium at {who}")


def test_a_hospital_answers_a_server_of_another_version_and_logs_who_must_update(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = Members(tmp_path)
    record = Challenge.new().to_record()
    record.config_records["challenge"]["version"] = WIRE.major + 1
    with caplog.at_level(logging.ERROR, "consilium.hospital"):
        answer = app(Message(record, 1000, "query.greet"), grid.contexts[0]).content
    assert Greeting.from_record(answer).hospital == NAMES[0]
    assert f"the server speaks wire {WIRE.major + 1}, this hospital {WIRE}" in caplog.text
    assert "update consilium at this hospital" in caplog.text


@pytest.mark.parametrize(
    ("kind", "file"),
    [("train", "job"), ("evaluate", "job"), ("query.offer", "offer"), ("query.receipt", "receipt"),
     ("query.judge", "comparison"), ("query.share", "envelope")],
)  # fmt: skip
def test_a_hospital_refuses_every_message_of_an_old_server(
    kind: str, file: str, tmp_path: Path
) -> None:
    old = from_bytes((FOLDER / "wire" / "3" / f"{file}.pb").read_bytes())
    grid = Members(tmp_path)
    refusal = Refusal.in_record(app(Message(old, 1000, kind), grid.contexts[0]).content)
    assert refusal is not None and refusal.code == "wire-version"


def test_what_a_lying_node_says_reaches_no_terminal_as_it_came(tmp_path: Path) -> None:
    def lie(grid: Members, message: Message, context: Context) -> RecordDict:
        record = Greeting("x").to_record()
        record.config_records["greeting"] |= {"hospital": "a\x1b[2J\n", "package": "1\n\x1b[31m"}
        return record

    (absent,) = Directory(Members(tmp_path, 0, lie), roster=ROSTER).refresh()
    assert absent.reason.isprintable()


def test_a_lost_greeting_leaves_its_hospital_out_until_it_is_asked_again(tmp_path: Path) -> None:
    grid = Members(tmp_path)
    grid.faults.append(Fault(lambda kind, i, _: i == VICTIM, drop_reply=True, times=1))
    directory = Directory(grid, roster=ROSTER, timeout=3.0)
    (absent,) = directory.refresh()
    assert "no answer" in absent.reason
    assert directory.refresh() == []
    assert directory.reach(NAMES)[1] == []


def test_a_run_reports_in_its_rounds_whom_it_left_out_and_goes_on(tmp_path: Path) -> None:
    """The whole way: roster file, ServerApp, record of the round."""
    from deploy.inprocess import run_in_process
    from tests.server_app.running import lines, the_run

    coordinator = Identity(bytes([9]) * 32)
    entries = tuple(RosterEntry(n, k, "2020-01-01", "2099-12-31") for n, k in ROSTER.items())
    (tmp_path / "roster.json").write_bytes(Roster("fed", entries).sign(coordinator))
    nodes: Mapping[int, dict[str, Any]] = Members(tmp_path).node_configs
    lie = Fault(
        lambda kind, i, _: kind == "query.greet" and i == 0,
        edit_reply=lambda record: Greeting(NAMES[VICTIM]).to_record(),
    )
    run_in_process(
        {
            **VALUES, "secagg": False, "rounds": 1, "model-width": 0.03125, "partition": "iid",
            "partition-min-size": 5, "learning-rate-schedule": "constant", "quorum": 0.5,
            "roster": str(tmp_path / "roster.json"), "connect-timeout": 0.1,
            "coordinator-key": base64.b64encode(coordinator.public).decode(),
        },
        num_hospitals=N, node_configs=nodes, faults=[lie],
    )  # fmt: skip
    record = lines(the_run())[1]
    assert record["contributed"] == NAMES[1:]
    (dropped,) = [d for d in record["dropped"] if d["stage"] == "greet"]
    assert dropped["hospital"] == "node 1000" and NAMES[VICTIM] in dropped["reason"]


def test_a_signature_under_a_greeting_is_none_under_anything_else() -> None:
    """Its statement is labelled: no other signature of the same key can be taken for it."""
    key, challenge = identity("st-mary"), Challenge(bytes(32))
    made = Greeting.signed("st-mary", key, challenge, run=1, node=2)
    roster = Roster("fed", (RosterEntry("st-mary", key.public, "2020-01-01", "2099-12-31"),))
    assert not verify(key.public, made.proof, roster._statement(roster.version))
