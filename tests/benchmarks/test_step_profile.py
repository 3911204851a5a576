"""The profile of a training step: what it names took time, and its arithmetic is the model's."""

from __future__ import annotations

import pytest
import torch

from benchmarks.dp_step import BASE, OURS
from benchmarks.step_profile import TOP, measure, operators


def test_the_operator_that_takes_longest_comes_first() -> None:
    a = torch.rand(1000, 1000)

    def step() -> None:
        for _ in range(5):
            a @ a
        a.sum()

    found = operators(step)
    assert found[0]["operator"] == "aten::mm" and found[0]["calls"] == 5
    shares = [op["share"] for op in found]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 1.01


@pytest.mark.parametrize("method", [BASE, OURS])
def test_a_row_has_time_arithmetic_and_operators_of_the_step_it_names(method: str) -> None:
    row = measure(method, "float32", 0.0625, 4, repeats=1)
    assert (row["method"], row["batch"]) == (method, 4)
    first = 28 * 28 * 27 * 4  # 3 → 4 channels, 3×3
    assert row["gflop_per_s"] * row["step_ms"] * 1e6 > 6 * 4 * first
    assert 1 <= len(row["operators"]) <= TOP
    assert any("conv" in op["operator"] for op in row["operators"])
