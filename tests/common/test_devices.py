"""Where models are trained: what is asked for, what there is, what is refused."""

from __future__ import annotations

import pytest
import torch

from common.config import RunConfig
from common.devices import device_name, device_of, gpu_count
from common.errors import ConfigError


def test_the_cpu_serves_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == device_of("cpu") == torch.device("cpu")
    assert device_name(device_of("auto")) == "cpu" and gpu_count("auto") == 0
    with pytest.raises(ConfigError, match="sees no GPU"):
        device_of("cuda")


def test_a_gpu_computes_float32_as_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = True
    cudnn.deterministic = False
    assert device_of("cuda") == device_of("auto") == torch.device("cuda")
    assert not matmul.allow_tf32 and not cudnn.allow_tf32
    assert cudnn.deterministic and not cudnn.benchmark
    assert device_of("cpu") == torch.device("cpu") and gpu_count("cpu") == 0
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


def test_a_head_on_features_stays_on_the_cpu_unless_a_gpu_is_asked_for() -> None:
    values = {"recipe": "prior-local", "base": "given"}
    assert RunConfig.parse(values).device == "cpu"
    assert RunConfig.parse({**values, "device": "cuda"}).device == "cuda"
    assert RunConfig.parse({}).device == "auto"
