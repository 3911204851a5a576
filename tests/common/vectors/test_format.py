"""Bases and envelopes as bytes: one content, one byte string, and nothing else is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from common.vectors import Base, SignedVector, TaskVector, VectorError, Withdrawal, base_id
from common.vectors.tensors import pack, unpack
from tests.common.vectors.building import (
    MODEL,
    base,
    envelope,
    identity,
    same,
    serial,
    values,
    vector,
    weights,
)

SECRET = identity("h1")


def refused(code: str, do: Any, *args: Any, **kwargs: Any) -> VectorError:
    with pytest.raises(VectorError) as caught:
        do(*args, **kwargs)
    assert caught.value.code == code, caught.value
    assert caught.value.what and caught.value.remedy
    return caught.value


def test_any_safetensors_library_reads_what_is_written() -> None:
    found = load(envelope(vector(1)))
    assert same({k: found[k] for k in sorted(found)}, values(1))
    found = load(base().to_bytes())
    assert same({k: found[k] for k in sorted(found)}, unpack(base().to_bytes())[0])


def test_what_another_writer_wrote_is_not_taken_for_ours() -> None:
    refused("vector-format", unpack, save(weights()))
    refused("vector-format", SignedVector.from_bytes, save(values(1)))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_an_envelope_with_any_byte_changed_is_refused(data: st.DataObject) -> None:
    good = envelope(vector(1, metrics={"val-accuracy": 0.5}, epsilon=6.0, delta=1e-4))
    at = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(VectorError):
        SignedVector.from_bytes(bytes(bad)).verify(SECRET.public)


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_an_envelope_that_is_cut_or_grown_is_refused(more: bytes, length: int) -> None:
    good = envelope(vector(1))
    for bad in (good[:length], more, good + more if more else b""):
        with pytest.raises(VectorError):
            SignedVector.from_bytes(bad)


def test_an_envelope_holds_what_went_in_and_its_hospitals_signature() -> None:
    made = vector(1, metrics={"val-accuracy": 0.875}, epsilon=6.0, delta=1.9e-4)
    found = SignedVector.from_bytes(envelope(made))
    found.verify(SECRET.public)
    assert same(found.vector.values, made.values)
    assert found.vector.fields_json() == made.fields_json()
    assert found.to_bytes() == envelope(made)
    refused("vector-signature", found.verify, identity("h2").public)


@pytest.mark.parametrize(
    "change",
    [
        {"hospital": "h2"}, {"base": "0" * 64}, {"serial": serial(9)}, {"bucket": 4},
        {"epsilon": 1.0, "delta": 0.0}, {"metrics": {"a": 1.0}}, {"values": values(2)},
        {"created": "2026-01-01T00:00:01Z"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_the_signature_covers_every_field(change: dict[str, Any]) -> None:
    signature = SignedVector.sign(vector(1), SECRET).signature
    refused("vector-signature", SignedVector(vector(1, **change), signature).verify, SECRET.public)


def rewritten(**changes: Any) -> bytes:
    """An envelope whose fields say something else, in the right form otherwise."""
    told = json.loads(unpack(envelope(vector(1)))[1]["consilium-vector"])
    told["fields"] |= changes
    text = json.dumps(told, sort_keys=True, separators=(",", ":"))
    return pack(values(1), {"consilium-vector": text})


@pytest.mark.parametrize(
    "change",
    [
        {"images": 812}, {"bucket": 3}, {"bucket": True}, {"bucket": 0}, {"bucket": 4.0},
        {"epsilon": 1.0}, {"epsilon": float("inf"), "delta": 0.1}, {"epsilon": 1.0, "delta": 1.0},
        {"metrics": {"a": float("nan")}}, {"metrics": {"a": "1"}}, {"metrics": []},
        {"metrics": {"A b": 1.0}}, {"metrics": {f"m{i}": 1.0 for i in range(17)}},
        {"created": "yesterday"}, {"hospital": "../x"}, {"serial": "A" * 32}, {"base": None},
    ],
    ids=repr,
)  # fmt: skip
def test_fields_that_no_vector_has_are_refused(change: dict[str, Any]) -> None:
    assert SignedVector.from_bytes(rewritten()).vector.hospital == "h1"
    refused("vector-format", SignedVector.from_bytes, rewritten(**change))


def test_another_spelling_of_the_same_content_is_refused() -> None:
    told = unpack(envelope(vector(1)))[1]["consilium-vector"]
    version = told[told.index(',"version"') : -1]
    for other in (told + " ", told.replace(":", ": ", 1), told.upper(), told[:-1] + version + "}"):
        bad = pack(values(1), {"consilium-vector": other})
        refused("vector-format", SignedVector.from_bytes, bad)
    signature = json.loads(told)["signature"]
    bad = pack(values(1), {"consilium-vector": told.replace(signature, signature.upper())})
    refused("vector-format", SignedVector.from_bytes, bad)


def test_values_that_are_not_finite_or_not_float32_are_refused() -> None:
    for bad in (np.nan, np.inf):
        broken = values(1)
        broken["body.bias"][2] = bad
        refused("vector-finite", vector, 1, values=broken)
        text = unpack(envelope(vector(1)))[1]
        refused("vector-finite", SignedVector.from_bytes, pack(broken, text))
    wide = {k: v.astype(np.float64) for k, v in values(1).items()}
    refused("vector-shape", vector, 1, values=wide)


def test_an_envelope_above_the_limit_is_not_read() -> None:
    good = envelope(vector(1))
    assert SignedVector.from_bytes(good, limit=len(good))
    refused("vector-format", SignedVector.from_bytes, good, limit=len(good) - 1)


def test_a_header_that_promises_too_much_is_refused_before_memory_is_taken() -> None:
    entry = {"dtype": "F32", "shape": [1 << 31, 1 << 31], "data_offsets": [0, 1 << 64]}
    header = json.dumps({"__metadata__": {}, "a": entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    refused("vector-format", unpack, len(header).to_bytes(8, "little") + header + bytes(64))


@settings(deadline=None)
@given(st.permutations(sorted(weights())), st.integers(0, 3))
def test_a_bases_id_is_of_its_content_in_any_order(names: list[str], seed: int) -> None:
    content = weights(seed)
    assert base_id(MODEL, {k: content[k] for k in names}) == base_id(MODEL, content)


def test_a_bases_id_changes_with_model_name_type_shape_and_value() -> None:
    content = weights()
    others = [
        {**content, "steps": np.array(1, dtype=np.int64)},
        {**content, "steps": np.array(0, dtype=np.int32)},
        {**content, "body.bias": content["body.bias"].reshape(5, 1)},
        {**{k: v for k, v in content.items() if k != "steps"}, "step": content["steps"]},
    ]
    ids = {base_id(MODEL, w) for w in (content, *others)} | {base_id(bytes(32), content)}
    assert len(ids) == 6


def test_a_base_comes_back_from_its_file(tmp_path: Path) -> None:
    made = base(3, version=4, parent="ab" * 32, pretrained=False)
    made.save(tmp_path / "base.safetensors")
    found = Base.load(tmp_path / "base.safetensors")
    assert (found.id, found.version, found.parent) == (made.id, 4, "ab" * 32)
    assert not found.pretrained and found.model_digest == MODEL
    assert same(found.weights, dict(sorted(made.weights.items())))


def test_a_base_whose_content_is_not_its_id_is_refused() -> None:
    data = bytearray(base().to_bytes())
    data[-1] ^= 1
    refused("base-id", Base.from_bytes, bytes(data))
    broken = weights()
    broken["body.bias"][0] = np.inf
    refused("base-finite", replace, base(), weights=broken)
    refused("base-file", Base.load, Path("nowhere.safetensors"))


def test_a_withdrawal_is_its_hospitals_or_nobodys() -> None:
    made = Withdrawal.sign("h1", serial(1), SECRET)
    found = Withdrawal.from_bytes(made.to_bytes())
    found.verify(SECRET.public)
    assert found == made
    refused("vector-signature", replace(made, serial=serial(2)).verify, SECRET.public)
    refused("vector-signature", replace(made, hospital="h2").verify, SECRET.public)
    refused("vector-signature", found.verify, identity("h2").public)
    refused("vector-format", Withdrawal.from_bytes, made.to_bytes() + b" ")
    refused("vector-format", Withdrawal.from_bytes, b"[]")


def test_a_vectors_own_signature_is_no_withdrawal() -> None:
    signed = SignedVector.sign(vector(1), SECRET)
    taken = Withdrawal(hospital="h1", serial=serial(1), signature=signed.signature)
    refused("vector-signature", taken.verify, SECRET.public)


def test_two_vectors_never_have_one_serial() -> None:
    made = [TaskVector(hospital="h1", base="0" * 64, values=values(1), bucket=1) for _ in range(50)]
    assert len({v.serial for v in made}) == 50
