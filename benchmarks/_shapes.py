"""Shapes of real models, routings of a known skew for them, and layers with random weights.

Letters: T tokens, E experts, k per token, H hidden size, I intermediate size, C capacity,
A held assignments. Importing this needs the standard library only; torch is imported when used,
since Triton decides at its import whether kernels are interpreted (`_common.setup`).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One MoE layer. Sizes are those of the model's config.json; `renormalize` is its own rule.

    ranks: G of the paper's table. peak: load max/mean that the paper saw in this model. speedup:
    its layer-level speed-up at gamma 2.0, 1.5, 1.0 (Token Drop, Expanded Drop), section "speed" of
    arXiv 2503.05066; None where it has no figure.
    """

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    renormalize: bool = False
    ranks: int = 8
    peak: float = 3.0
    speedup: dict[float, tuple[float, float]] | None = field(default=None, compare=False)

    def flops(self, assignments: int) -> int:
        """Operations of the three products of that many assignments: 2 * 3 * H * I each."""
        return 6 * self.hidden * self.intermediate * assignments

    def bytes(self, tokens: int, busy_experts: int, itemsize: int = 2) -> int:
        """The fewest bytes: weights of the experts with tokens once, rows in and out once."""
        weights = 3 * self.hidden * self.intermediate * busy_experts
        return itemsize * (weights + 2 * tokens * self.hidden)


SHAPES = {
    s.name: s
    for s in (
        Shape(
            *("mixtral-8x7b", 4096, 14336, 8, 2, True, 8, 2.8),
            {2.0: (1.44, 1.43), 1.5: (1.89, 1.86), 1.0: (2.55, 2.51)},
        ),
        Shape("mixtral-8x22b", 6144, 16384, 8, 2, True),
        Shape(
            *("olmoe", 2048, 1024, 64, 8, False, 8, 7.0),
            {2.0: (1.21, 1.16), 1.5: (1.30, 1.25), 1.0: (1.46, 1.36)},
        ),
        Shape(
            *("qwen1.5-moe", 2048, 1408, 60, 4, False, 6, 2.8),
            {2.0: (1.10, 1.03), 1.5: (1.13, 1.08), 1.0: (1.18, 1.13)},
        ),
        Shape(
            *("deepseek-v2-lite", 2048, 1408, 64, 6, False, 8, 5.0),
            {2.0: (1.12, 1.09), 1.5: (1.23, 1.15), 1.0: (1.37, 1.31)},
        ),
        Shape("qwen3-30b-a3b", 2048, 768, 128, 8, True),
    )
}


TINY = Shape("tiny", 64, 48, 8, 2, True, 2, 3.0, {1.0: (1.1, 1.1)})


@functools.cache
def expert_bias(E: int, k: int, peak: float, seed: int = 0) -> tuple[float, ...]:
    """Constant router logits [E] under which the largest load is `peak` times the mean.

    One hot expert; the others fall evenly from half of its bias to three quarters below zero, in
    random order (as in examples/make_mixtral.py). On top of it a router has noise of deviation 1.
    The bias is found by bisection on 8192 tokens; no load passes E / k times the mean, so a larger
    `peak` means 0.98 of that. peak 1: no bias.
    """
    import torch

    # Device and dtype are named: vLLM loads weights with other defaults.
    generator = torch.Generator("cpu").manual_seed(seed)
    given: dict[str, Any] = {"generator": generator, "device": "cpu"}
    hot = int(torch.randint(E, (1,), **given))
    pattern = torch.empty(E, dtype=torch.float32, device="cpu")
    others = torch.randperm(E, **given)
    falling = torch.linspace(0.5, -0.75, max(E - 1, 0), dtype=torch.float32, device="cpu")
    pattern[others[others != hot]] = falling
    pattern[hot] = 1.0
    if peak <= 1 or E == 1:
        return tuple([0.0] * E)
    noise = torch.randn(8192, E, dtype=torch.float32, **given)
    wanted = min(peak, 0.98 * E / k)
    low, high = 0.0, 16.0
    for _ in range(24):
        middle = (low + high) / 2
        ids = (noise + middle * pattern).topk(k).indices
        loads = torch.bincount(ids.reshape(-1), minlength=E)
        if float(loads.max()) / (8192 * k / E) < wanted:
            low = middle
        else:
            high = middle
    return tuple((high * pattern).tolist())


def router_logits(
    T: int, shape: Shape, peak: float, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Tensor:
    """Router logits [T, E] whose top-k loads have about that max/mean (see `expert_bias`)."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(T, shape.experts, generator=generator, device=device)
    bias = torch.tensor(expert_bias(shape.experts, shape.top_k, peak), device=device)
    return (noise + bias).to(dtype)


def make_plan(shape: Shape, mode: str, gamma: float, **options: Any) -> Any:
    """The plan of a mode. expert_device and has_token_device go to `resolve`, the rest is
    configuration."""
    from vllm_capmoe import CapacityConfig
    from vllm_capmoe.plan import resolve

    given = {k: options.pop(k) for k in ("expert_device", "has_token_device") if k in options}
    config = CapacityConfig(mode=mode, factor=gamma, **options)
    return resolve(
        config,
        num_experts=shape.experts,
        top_k=shape.top_k,
        renormalize=shape.renormalize,
        **given,
    )


def with_capacity(plan: Any, capacity: int, T: int) -> Any:
    """The plan whose limit at T tokens is exactly `capacity`: gamma = C * E / (T * k)."""
    return replace(
        plan, gamma=Fraction(capacity * plan.num_experts, T * plan.top_k), min_capacity=1
    )


def capacity_of(plan: Any, T: int) -> int | None:
    """C at T prompt tokens, in exact integers; None where no limit is in effect."""
    if plan.mode == "off" or plan.gamma is None:
        return None
    mean = Fraction(T * plan.top_k, plan.num_experts)
    capacity = max(plan.min_capacity, math.ceil(plan.gamma * mean))
    return capacity if capacity < T else None


@dataclass(frozen=True)
class Layer:
    """Weights w13 [E, 2I, H] and w2 [E, H, I] at the scale that keeps activations near one."""

    w13: Tensor
    w2: Tensor


def make_layer(shape: Shape, device: torch.device, dtype: torch.dtype, experts: int = 0) -> Layer:
    """Random weights. experts: how many, if not all."""
    import torch

    E, H, I = experts or shape.experts, shape.hidden, shape.intermediate  # noqa: E741
    w13 = torch.randn(E, 2 * I, H, device=device, dtype=dtype).mul_(H**-0.5)
    w2 = torch.randn(E, H, I, device=device, dtype=dtype).mul_(I**-0.5)
    return Layer(w13, w2)
