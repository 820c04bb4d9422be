"""What the experts refuse, before any launch, and that the message holds both values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from capmoe_kernels import experts as ours
from capmoe_kernels.launch import ExpertsConfig, GemmConfig

DEVICE = "cpu" if ours.INTERPRETED else "cuda"


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def ints(*shape: int) -> Tensor:
    return zeros(*shape, dtype=torch.int32)


def transposed(tensor: Tensor) -> Tensor:
    """The same values with the last two dimensions in the other order in memory."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def call(**changes: Any) -> Tensor:
    """A call that would be right: T=9, W=2, E=3, H=40, I=24."""
    arguments = {
        "hidden": zeros(9, 40),
        "w13": zeros(3, 48, 40),
        "w2": zeros(3, 40, 24),
        "weights": zeros(9, 2, dtype=torch.float32),
        "experts": ints(9, 2),
        "activation": "silu",
        **changes,
    }
    return ours.fused_experts(**arguments)


def config(**tile: int) -> ExpertsConfig:
    gemm = GemmConfig(**{"block_m": 16, "block_n": 32, "block_k": 16, "num_stages": 2, **tile})
    return ExpertsConfig(gemm, gemm)


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gate_up_kernel", "down_kernel", "combine_kernel"):
        monkeypatch.setattr(ours.kernels, name, None)


def seats(order: Tensor, offsets: Tensor) -> Callable[[], dict[str, Any]]:
    return lambda: {"seats": ours.Seats(order, offsets)}


@pytest.mark.parametrize("make,words", [
    (lambda: {"w13": zeros(48, 40)}, ["w13", "[48, 40]", "must be [3, 48, 40]"]),
    (lambda: {"w13": zeros(3, 46, 40)}, ["w13", "[3, 46, 40]", "[3, 48, 40]"]),
    (lambda: {"w13": zeros(3, 48, 40).half()}, ["w13", "float16", "bfloat16"]),
    (lambda: {"w13": transposed(zeros(3, 48, 40))}, ["w13", "strides", "the last must be 1"]),
    (lambda: {"w2": transposed(zeros(3, 40, 24))}, ["w2", "strides", "the last must be 1"]),
    (lambda: {"w2": zeros(3, 40, 12)}, ["[3, 48, 40]", "[3, 24, 40]", "w2 [3, 40, 12]"]),
    (lambda: {"w13": zeros(3, 0, 40), "w2": zeros(3, 40, 0)}, ["w2", "[3, 40, 0]", "at least 1"]),
    (lambda: {"hidden": zeros(9, 39)}, ["hidden", "[9, 39]", "[T, 40]"]),
    (lambda: {"hidden": zeros(9, 40).half()}, ["hidden", "float16", "bfloat16"]),
    (lambda: {"hidden": transposed(zeros(9, 40))}, ["hidden", "strides", "the last must be 1"]),
    (lambda: {"experts": ints(8, 2)}, ["experts", "[8, 2]", "[9, W]"]),
    (lambda: {"experts": ints(9, 2).long()}, ["experts", "int64", "int32"]),
    (lambda: {"experts": transposed(ints(9, 2))}, ["experts", "strides", "contiguous"]),
    (lambda: {"weights": zeros(9, 1, dtype=torch.float32)}, ["weights", "[9, 1]", "[9, 2]"]),
    (lambda: {"weights": zeros(9, 2, dtype=torch.float64)}, ["weights", "float64", "float32"]),
    (lambda: {"activation": "tanh"}, ["'tanh'", "silu"]),
    (lambda: {"activation": "swigluoai_uninterleave"}, ["swiglu_limit None", "a number"]),
    (lambda: {"activation": "situ"}, ["situ_beta None", "a number"]),
    (lambda: {"w13_bias": zeros(3, 40)}, ["w13_bias", "[3, 40]", "[3, 48]"]),
    (lambda: {"w2_bias": ints(3, 40)}, ["w2_bias", "int32", "bfloat16"]),
    (lambda: {"expert_map": ints(5).long()}, ["expert_map", "int64", "int32"]),
    (lambda: {"max_rows_per_expert": -1}, ["max_rows_per_expert", "-1", "at least 0"]),
    (lambda: {"out": zeros(9, 40).float()}, ["out", "float32", "bfloat16"]),
    (lambda: {"out": zeros(8, 40)}, ["out", "[8, 40]", "[9, 40]"]),
    (seats(ints(17), ints(4)), ["seats.order", "[17]", "[18]"]),
    (seats(ints(18), ints(3)), ["seats.offsets", "[3]", "[4]"]),
    (seats(ints(18), ints(4).long()), ["seats.offsets", "int64", "int32"]),
    (lambda: {"workspaces": (zeros(431), zeros(720))}, ["workspaces[0]", "431", "432"]),
    (lambda: {"workspaces": (zeros(432), zeros(719))}, ["workspaces[1]", "719", "720"]),
    (lambda: {"workspaces": (ints(999),) * 2}, ["workspaces[0]", "int32", "bfloat16"]),
    (lambda: {"config": config(block_n=16)}, ["config.gate_up", "block_n 16", "at least 32"]),
    (lambda: {"config": config(block_m=512, block_k=256)}, ["558080", "232448"]),
    (lambda: {"hidden": zeros(9, 40).to("meta")}, ["hidden", "meta", DEVICE]),
    (lambda: {"w2": zeros(3, 40, 24).to("meta")}, ["[3, 40, 24]", "meta", DEVICE]),
])  # fmt: skip
def test_refuses(make: Callable[[], dict[str, Any]], words: list[str]) -> None:
    changes = make()
    if "workspaces" in changes:
        changes["config"] = config()
    with pytest.raises(ValueError) as error:
        call(**changes)
    for word in words:
        assert word in str(error.value)
