"""The routing kernels beside plain torch, every tensor between walls of garbage.

What a kernel writes starts as garbage too: a place that is not written, or one outside, shows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from capmoe_kernels import routing
from capmoe_kernels.routing import Selection, route_triton
from vllm_capmoe import CapacityConfig
from vllm_capmoe.plan import Plan, resolve
from vllm_capmoe.torch_routing import route_torch

DEVICE = "cpu" if routing.INTERPRETED else "cuda"
WALL = 64  # elements on either side; keeps the alignment to 16 bytes
GARBAGE = {torch.float32: math.nan, torch.int32: -77, torch.int64: -77, torch.uint8: 77}
INF, NAN = math.inf, math.nan


class Walls:
    """Stands in for torch.empty and torch.zeros: garbage around, and inside of what is empty."""

    def __init__(self) -> None:
        self.bases: list[tuple[Tensor, int]] = []

    def surround(self, inner: Tensor, garbage: Any) -> Tensor:
        size = inner.numel()
        base = torch.full((size + 2 * WALL,), garbage, dtype=inner.dtype, device=DEVICE)
        base[WALL : WALL + size] = inner.reshape(-1)
        self.bases.append((base, size))
        return base[WALL : WALL + size].view(inner.shape)

    def empty(self, *shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        garbage = GARBAGE[dtype]
        return self.surround(torch.full(shape, garbage, dtype=dtype, device=device), garbage)

    def zeros(self, *shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        inner = torch.full(shape, 0, dtype=dtype, device=device)
        return self.surround(inner, GARBAGE[dtype])

    def check(self) -> None:
        for base, size in self.bases:
            for wall in (base[:WALL], base[WALL + size :]):
                same = wall.isnan() if base.is_floating_point() else wall == GARBAGE[base.dtype]
                assert bool(same.all()), "a kernel wrote outside of a tensor"


def run(function: Callable[..., Selection], *args: Any, **kwargs: Any) -> Selection:
    """Call it with walls around all tensors that it allocates."""
    walls = Walls()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", walls.empty)
        patch.setattr(torch, "zeros", walls.zeros)
        result = function(*args, **kwargs)
    walls.check()
    return result


def bits(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The bits of float32 numbers; every NaN is the same."""
    return weights.nan_to_num(nan=0.0, posinf=INF, neginf=-INF).view(torch.int32), weights.isnan()


def assert_same(got: Selection, want: Any, num_experts: int) -> None:
    """`got` is the Selection `want`, in values, types and shapes; and its seats fit."""
    for name in (
        "experts", "load_before", "load_after", "capacity", "kept", "left_without", "mass",
        "lost", "prompts",
    ):  # fmt: skip
        ours, theirs = getattr(got, name), getattr(want, name)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
        assert torch.equal(ours, theirs), f"{name}\n{ours}\n{theirs}"
    assert got.weights.dtype == torch.float32 and got.weights.shape == want.weights.shape
    for ours, theirs in zip(bits(got.weights), bits(want.weights), strict=True):
        assert torch.equal(ours, theirs), f"weights\n{got.weights}\n{want.weights}"
    assert int(got.dropped) == int(want.dropped)
    assert int(got.expanded) == int(want.expanded)

    flat = got.experts.reshape(-1).tolist()
    order = sorted((e, a) for a, e in enumerate(flat) if e >= 0)
    seats = [-1] * len(flat)
    for seat, (_, a) in enumerate(order):
        seats[a] = seat
    assert got.seats.order.tolist() == [a for _, a in order] + [-1] * (len(flat) - len(order))
    loads = [flat.count(e) for e in range(num_experts)]
    assert got.seats.offsets.tolist() == [0, *itertools.accumulate(loads)]
    assert got.seats.seat.reshape(-1).tolist() == seats
    assert got.seats.seat.shape == got.experts.shape
    for tensor in (got.seats.order, got.seats.offsets, got.seats.seat):
        assert tensor.dtype == torch.int32


def check(scores: Tensor, plan: Plan, **tensors: Any) -> Selection:
    """Both ways, the same outcome; the arguments stay as they are."""
    int64 = {n: v.long() for n, v in tensors.items() if n in ("device_E", "token_device_T")}
    want = route_torch(scores, plan, **{**tensors, **int64})
    walls = Walls()
    arguments = {"scores": scores, **tensors}
    inside = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.dtype in GARBAGE and value.is_contiguous():
            inside[name] = walls.surround(value, GARBAGE[value.dtype])
        elif isinstance(value, Tensor) and value.dtype == torch.bool:
            bytes_ = walls.surround(value.view(torch.uint8), GARBAGE[torch.uint8])
            inside[name] = bytes_.view(torch.bool)
    counters = torch.arange(2 * plan.num_experts + len(routing.TOTALS), device=DEVICE)
    inside["counters"] = walls.surround(counters, GARBAGE[torch.int64])
    got = run(route_triton, inside.pop("scores"), plan, **inside)
    walls.check()
    assert_same(got, want, plan.num_experts)
    before, after = want.load_before.tolist(), want.load_after.tolist()
    totals = (want.dropped, want.expanded, want.left_without)
    step = [int(max(before) > 0), *map(int, totals), max(before), max(after)]
    active = [sum(load > 0 for load in loads) for loads in (before, after)]
    kinds = [*active, 0, 0] if want.prompts > 0 else [0, 0, *active]
    step += [int(want.mass), int(want.lost), int(want.prompts > 0), *kinds]
    assert (inside["counters"] - counters).tolist() == [*before, *after, *step]
    return got


def make_plan(E: int, k: int, **config: Any) -> Plan:
    config = {"mode": "drop", "factor": 1.0, "min_capacity": 1, **config}
    return resolve(CapacityConfig(**config), num_experts=E, top_k=k, renormalize=True)
