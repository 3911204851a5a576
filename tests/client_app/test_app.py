"""The ClientApp: light to import, and silent about what it knows."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from client_app.app import app
from common.config import KEYS
from common.messages import Greeting, Job, Refusal
from common.model import ModelSpec, build, get_weights
from deploy.inprocess import InProcessGrid


def test_importing_the_client_app_does_not_import_torch() -> None:
    for module in ("client_app.app", "client_app.secagg", "client_app.hospital"):
        heavy = "{'torch', 'opacus', 'ray', 'sklearn'}"
        code = f"import sys, {module}; print({heavy} & set(sys.modules))"
        assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def ask(kind: str, content: RecordDict, config: dict[str, Any], node: dict[str, Any]) -> RecordDict:
    InProcessGrid(app, 1, {})  # sets Flower's idea of who is asking
    run_config = {key.name: key.default for key in KEYS} | config
    context = Context(
        run_id=1, node_id=7, node_config=node, state=RecordDict(), run_config=run_config
    )
    return app(Message(content, 7, kind), context).content


NODE = {"partition-id": 1, "num-partitions": 4}
SYNTHETIC = {
    "secagg": False,
    "dataset": "synthetic",
    "synthetic-size": 400,
    "privacy": "none",
    "partition-min-size": 5,
}


def test_a_simulated_hospital_tells_its_name() -> None:
    record = ask("query.greet", RecordDict(), SYNTHETIC, NODE)
    assert Greeting.from_record(record).hospital == "hospital-01"


def test_a_node_that_is_no_simulated_hospital_refuses() -> None:
    refusal = Refusal.in_record(ask("query.greet", RecordDict(), SYNTHETIC, {}))
    assert refusal is not None
    assert refusal.code == "config"


def test_details_of_an_error_stay_in_the_hospitals_log(caplog: pytest.LogCaptureFixture) -> None:
    secret = "/wards/oncology/patients.npz"
    weights = get_weights(build(ModelSpec(width=0.03125), seed=0))
    job = Job("run-1", 1, b"x", weights).to_record()
    config = {"dataset": "npz", "data-path": secret, "privacy": "none", "secagg": False}
    answer = ask("train", job, config, NODE)
    refusal = Refusal.in_record(answer)
    assert refusal is not None
    assert refusal.code == "data"
    assert "oncology" not in repr(answer)
    assert "oncology" in caplog.text
    assert refusal.correlation_id in caplog.text


def test_a_model_of_another_shape_is_refused_before_training() -> None:
    weights = get_weights(build(ModelSpec(width=0.0625), seed=0))
    job = Job("run-1", 1, ModelSpec(width=0.0625).digest(), weights)
    refusal = Refusal.in_record(ask("train", job.to_record(), SYNTHETIC, NODE))
    assert refusal is not None
    assert refusal.code == "config"


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_malformed_requests_are_refused_not_crashed_on(kind: str) -> None:
    refusal = Refusal.in_record(ask(kind, RecordDict(), SYNTHETIC, NODE))
    assert refusal is not None
    assert refusal.code == "protocol"
