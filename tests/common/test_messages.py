"""Records on the wire: what is built is what is read, and nothing else is accepted."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError, ProtocolError
from common.messages import (
    SMALL,
    VERSION,
    Envelope,
    Greeting,
    Job,
    Refusal,
    Report,
    check_name,
    check_run_id,
)

WEIGHTS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array(3, dtype=np.int64),
}  # 0-d stays 0-d


def test_a_job_is_read_as_it_was_built() -> None:
    job = Job("run-1", 3, b"digest", WEIGHTS)
    again = Job.from_record(job.to_record())
    assert (again.run, again.round, again.model_digest) == ("run-1", 3, b"digest")
    assert set(again.weights) == {"b", "a"}
    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(again.weights[name], array)
        assert again.weights[name].dtype == array.dtype
        assert again.weights[name].shape == array.shape


def test_a_report_is_read_as_it_was_built() -> None:
    report = Report("run-1", 3, "st-mary", {"examples": 5.0}, WEIGHTS)
    again = Report.from_record(report.to_record(), run="run-1", round=3)
    assert again.hospital == "st-mary"
    assert again.metrics == {"examples": 5.0}
    np.testing.assert_array_equal(again.update["b"], WEIGHTS["b"])


def test_an_envelope_keeps_its_bytes() -> None:
    for payload in (b"", b"x", bytes(range(256)) * 1000):
        assert Envelope.from_record(Envelope(payload).to_record()).payload == payload


@pytest.mark.parametrize(("run", "round_"), [("run-2", 3), ("run-1", 4)])
def test_an_answer_of_another_run_or_round_is_refused(run: str, round_: int) -> None:
    record = Report("run-1", 3, "a", {}).to_record()
    with pytest.raises(ProtocolError, match="belongs to run"):
        Report.from_record(record, run=run, round=round_)


def test_another_version_is_refused() -> None:
    record = Job("run-1", 1, b"", {}).to_record()
    record.config_records["job"]["version"] = VERSION + 1
    with pytest.raises(ProtocolError, match=f"version {VERSION + 1}"):
        Job.from_record(record)


@pytest.mark.parametrize("field", ["run", "round", "model", "version", "invitation"])
def test_a_missing_field_is_named(field: str) -> None:
    record = Job("run-1", 1, b"", {}).to_record()
    del record.config_records["job"][field]
    with pytest.raises(ProtocolError, match=field):
        Job.from_record(record)


def test_arrays_that_do_not_decode_are_refused() -> None:
    record = Job("run-1", 1, b"", WEIGHTS).to_record()
    record.array_records["weights"]["packed"].data = b"\x93NUMPY garbage"
    with pytest.raises(ProtocolError, match="cannot be decoded"):
        Job.from_record(record)


def test_pickled_arrays_are_never_loaded() -> None:
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    record = Job("run-1", 1, b"", WEIGHTS).to_record()
    record.array_records["weights"]["packed"].data = buffer.getvalue()
    with pytest.raises(ProtocolError, match="cannot be decoded"):
        Job.from_record(record)
    pickled = Array("float64", (1,), "numpy.ndarray", buffer.getvalue())
    record["weights"] = ArrayRecord({"packed": pickled})
    with pytest.raises(ProtocolError, match="not packed"):
        Job.from_record(record)


def test_a_model_is_one_object_of_a_message_however_many_arrays_it_has() -> None:
    many = {f"layer-{i}": np.full((i + 1,), float(i), dtype=np.float32) for i in range(40)}
    record = Job("run-1", 1, b"", many).to_record()
    (array,) = record.array_records["weights"].values()
    assert array.shape == (sum(range(1, 41)),)
    read = Job.from_record(record).weights
    assert set(read) == set(many) and all(np.array_equal(read[k], many[k]) for k in many)


@pytest.mark.parametrize("size", [0, 1, SMALL, SMALL + 1])
def test_a_payload_of_any_size_arrives_whole(size: int) -> None:
    payload = bytes(range(256)) * (size // 256 + 1)
    record = Envelope(payload[:size]).to_record()
    assert Envelope.from_record(record).payload == payload[:size]
    assert bool(record.array_records) == (size > SMALL)


@pytest.mark.parametrize("metric", [float("nan"), float("inf")])
def test_metrics_that_are_not_finite_are_refused(metric: float) -> None:
    record = Report("run-1", 1, "a", {"examples": metric}).to_record()
    with pytest.raises(ProtocolError, match="examples"):
        Report.from_record(record, run="run-1", round=1)


@pytest.mark.parametrize("bad", ["", "..", "../x", "a/b", "-a", "a" * 65, "a\n", "ä"])
def test_names_that_could_be_paths_are_refused(bad: str) -> None:
    with pytest.raises(ProtocolError):
        check_run_id(bad)
    with pytest.raises(ProtocolError):
        check_name(bad)


def test_a_refusal_tells_a_code_and_an_id_only() -> None:
    refusal = Refusal.of(DataError("/secret/path/patient.png is unreadable", "x"))
    record = refusal.to_record()
    assert refusal.code == "data"
    assert "secret" not in repr(record)
    assert Refusal.in_record(record) == refusal
    assert Refusal.of(RuntimeError("secret")).code == "internal"
    assert Refusal.in_record(Greeting("a").to_record()) is None


@given(
    st.dictionaries(
        st.text(max_size=8), st.integers(-5, 5) | st.text(max_size=5) | st.binary(max_size=5)
    )
)
def test_any_header_is_either_read_or_a_protocol_error(head: dict[str, object]) -> None:
    record = RecordDict({"job": ConfigRecord(head), "greeting": ConfigRecord(head)})  # type: ignore[arg-type]
    for read in (Job.from_record, Greeting.from_record, Envelope.from_record):
        with pytest.raises(ProtocolError):
            read(record)


def test_a_message_that_was_read_is_freed_at_once_and_not_when_cycles_are_collected() -> None:
    """A server that adds up masked vectors as they come would otherwise hold several."""
    record = Envelope(bytes(SMALL + 1)).to_record()
    report = Report("run-1", 1, "a", {"examples": 1.0}, {"w": np.zeros(3, np.float32)}).to_record()
    freed = [weakref.ref(r) for r in (record, report)]
    gc.disable()
    try:
        Envelope.from_record(record)
        assert Refusal.in_record(record) is None
        Report.from_record(report, run="run-1", round=1)
        del record, report
        assert [one() for one in freed] == [None, None]
    finally:
        gc.enable()
