"""The routing kernels beside plain torch, every tensor between walls of garbage.

What a kernel writes starts as garbage too: a place that is not written, or one outside, shows.
"""

from __future__ import annotations

import itertools
import math
import random
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


# --- Random cases ---------------------------------------------------------------------------


def make_scores(rng: random.Random, T: int, E: int) -> Tensor:
    """[T, E] in one of several styles, ties and odd numbers among them."""
    odd = [NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-38, 3.4e38, 0.1]
    style = rng.choice(["softmax", "normal", "bfloat16", "few", "equal", "hot", "odd", "nan"])
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    scores = torch.randn(T, E, generator=generator)
    if style in ("softmax", "bfloat16", "nan"):
        scores = (2 * scores).softmax(dim=1)
    if style == "nan":
        scores = scores.masked_fill(torch.rand(T, E, generator=generator) < 0.3, NAN)
    if style == "few":
        scores = scores.sign() * 0.25
    if style == "equal":
        scores = torch.full((T, E), 0.25)
    if style == "hot":
        scores = scores.index_fill(1, torch.tensor([rng.randrange(E)]), 9.0)
    if style == "odd":
        scores = torch.tensor([[rng.choice(odd) for _ in range(E)] for _ in range(T)])
        scores = scores.reshape(T, E)
    dtype = torch.bfloat16 if style == "bfloat16" else torch.float32
    if style in ("normal", "odd") and rng.random() < 0.4:
        dtype = rng.choice([torch.float16, torch.float64])
    return scores.to(dtype=dtype, device=DEVICE)


def make_case(
    rng: random.Random, T: int | None = None, **fixed: Any
) -> tuple[Tensor, Plan, dict[str, Any]]:
    """Scores, plan and tensors of an allowed call; `fixed` are keys of the configuration."""
    E = rng.choice([1, 2, 3, 5, 8, 8, 12, 16])
    k = rng.choice([1, min(2, E), min(3, E), rng.randint(1, E), E])
    T = rng.choice([1, 2, 5, 16, 17, rng.randint(20, 50)]) if T is None else T
    mode = fixed.get("mode") or rng.choice(["drop", "expanded", "reroute"])
    if mode == "reroute" and rng.random() < 0.7:  # room, so that something can be given
        E, k, T = rng.choice([8, 12, 16]), rng.choice([1, 2, 3]), rng.randint(16, 50)
        room = {"factor": rng.choice([0.75, 1.0, 1.1]), "min_capacity": 1, "min_tokens": 0}
        fixed = {**room, **fixed}

    def some(share: float) -> Tensor:
        return torch.tensor([rng.random() < share for _ in range(T)], dtype=torch.bool)

    ids = rng.choice([torch.int32, torch.int64])
    devices = [[e % 3 for e in range(E)], [e * 2 // E for e in range(E)], [1] * E]
    devices += [[rng.choice([0, 2, 5]) for _ in range(E)], [rng.randrange(E) for _ in range(E)]]
    device_E = rng.choice(devices)
    config: dict[str, Any] = {
        "mode": mode,
        "fill": rng.choice(["busiest", "capacity"]),
        "factor": rng.choice([0.1, 0.25, 0.5, 0.75, 1.0, 1.1, 2.0]),
        "metric": rng.choice(["score", "order", "reverse-order", "random"]),
        "level": rng.choice(["expert", "device"]),
        "scope": rng.choice(["batch", "request"]),
        "candidates": rng.choice(["local", "global"]),
        "expanded_experts": rng.choice([None, "all", 1, 2]),
        "max_experts": rng.choice(["auto", "none", k, k + 1]),
        "renormalize": rng.choice(["always", "never"]),
        "priority": rng.choice(["uniform", "image-first", "text-first"]),
        "min_capacity": rng.choice([1, 1, 2, 4]),
        "min_tokens": rng.choice([0, 0, 0, T, max(T - 3, 0), 8]),
        **fixed,
    }
    if config["scope"] == "batch":
        config.setdefault("decode_keep", rng.choice(["off", "auto", rng.randint(1, k)]))
    plan = resolve(
        CapacityConfig(**config),
        num_experts=E,
        top_k=k,
        expert_device=device_E,
        has_token_device=True,
    )
    tensors: dict[str, Any] = {
        "device_E": torch.tensor(device_E, dtype=ids),
        "token_device_T": torch.tensor([rng.choice(device_E) for _ in range(T)], dtype=ids),
        "is_image_T": some(0.5),
        "seed": rng.choice([0, 1, -1, 2**32 - 1, 2**40 + 7, rng.randrange(2**32)]),
    }
    padding = None
    if rng.random() < 0.6:
        padding = tensors["is_padding_T"] = some(rng.choice([0.1, 0.5]))
        if rng.random() < 0.4:  # at the end, as vLLM pads
            padding = tensors["is_padding_T"] = padding.sort().values
    if rng.random() < 0.6:
        tensors["is_decode_T"] = some(rng.choice([0.1, 0.3, 0.8]))
    if rng.random() < 0.4:
        rows = [rng.sample(range(E), k) for _ in range(T)]
        tensors["topk_TK"] = topk = torch.tensor(rows, dtype=ids).reshape(T, k)
        if padding is not None:
            topk[padding] = rng.choice([-1, E, 99])
    if plan.scope == "request":
        count = rng.choice([1, 2, 4, T])
        request = [rng.randrange(count) for _ in range(T)]
        if rng.random() < 0.7:  # neighbours, as in vLLM
            request.sort()
        tensors["request_T"] = torch.tensor(request, dtype=torch.int64)
        tensors["num_requests"] = count + rng.choice([0, 0, 3])
    for name, value in tensors.items():
        tensors[name] = value.to(DEVICE) if isinstance(value, Tensor) else value
    return make_scores(rng, T, E), plan, tensors
