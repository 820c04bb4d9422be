"""The opponents of bench_moe_layer.py: the same layer, on the same inputs, by others.

What each is, and what it is spared, is said there.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import _shapes

from capmoe_kernels.contract import Plan, Seats

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OPPONENTS = ("loop", "grouped", "vllm")


class Point(Protocol):
    """The shape of a case, its tokens, and its name in messages."""

    @property
    def shape(self) -> _shapes.Shape: ...
    @property
    def tokens(self) -> int: ...
    def key(self) -> object: ...


class Routed(Protocol):
    """One routing: who holds what, with its seats."""

    @property
    def weights(self) -> Tensor: ...
    @property
    def experts(self) -> Tensor: ...
    @property
    def seats(self) -> Seats | None: ...


class Case(Protocol):
    """What an opponent takes: `sets` inputs that take turns, each routed already."""

    plan: Plan
    device: torch.device
    sets: int
    hidden: list[Tensor]
    logits: list[Tensor]

    @property
    def point(self) -> Point: ...
    @property
    def routed(self) -> Sequence[Routed]: ...
    def layer(self, r: int) -> _shapes.Layer: ...


class Sorted:
    """What the opponents in plain torch get for free: rows by expert, loads on the host."""

    def __init__(self, case: Case, r: int) -> None:
        import torch

        seats, W = case.routed[r].seats, case.plan.width
        assert seats is not None and seats.seat is not None, "those of a routing say both"
        ends = seats.offsets.tolist()
        held = ends[-1]
        pairs = enumerate(itertools.pairwise(ends))
        self.bounds = [(e, begin, end) for e, (begin, end) in pairs if begin < end]
        self.ends = seats.offsets[1:].contiguous()
        order = torch.cat([seats.order[:held], seats.order.new_zeros(1)]).long()
        self.token_A = order // W  # one row more, for places without an expert
        weight_A = case.routed[r].weights.reshape(-1)[order].clone()
        weight_A[held] = 0
        self.weight_A1 = weight_A[:, None]
        self.place_TW = seats.seat.long().masked_fill(seats.seat < 0, held).reshape(-1)

    def combine(self, y_AH: Any, T: int) -> Any:
        y_AH[-1].zero_()
        y_AH.mul_(self.weight_A1)
        return y_AH[self.place_TW].view(T, -1, y_AH.shape[1]).sum(1)


def loop(case: Case, sets: list[Sorted], r: int) -> Any:
    """A cuBLAS product per expert."""
    import torch
    import torch.nn.functional as F

    rows, layer = sets[r], case.layer(r)
    x = case.hidden[r][rows.token_A]
    y = torch.empty_like(x)
    for e, begin, end in rows.bounds:
        gate, up = (x[begin:end] @ layer.w13[e].T).chunk(2, dim=1)
        torch.mm(F.silu(gate) * up, layer.w2[e].T, out=y[begin:end])
    return rows.combine(y, case.point.tokens)


def grouped(case: Case, sets: list[Sorted], r: int) -> Any:
    """torch._grouped_mm over the rows of all experts."""
    import torch
    import torch.nn.functional as F

    rows, layer = sets[r], case.layer(r)
    x = case.hidden[r][rows.token_A]
    gate, up = torch._grouped_mm(x, layer.w13.mT, offs=rows.ends).chunk(2, dim=1)
    y = torch._grouped_mm(F.silu(gate) * up, layer.w2.mT, offs=rows.ends)
    return rows.combine(y, case.point.tokens)


def grouped_mm_problem() -> str | None:
    """Why torch has no `_grouped_mm(self, mat2, offs)` to measure, or None. torch 2.8 and newer."""
    import torch

    if not hasattr(torch, "_grouped_mm"):
        return f"torch {torch.__version__} has no _grouped_mm"
    names = [a.name for a in torch.ops.aten._grouped_mm.default._schema.arguments]
    expected = ["self", "mat2", "offs"]
    return None if names[:3] == expected else f"_grouped_mm takes {names}, expected {expected} ..."


class Vllm:
    """vLLM's Triton experts and its routing, for one case. ImportError where vLLM is not there."""

    def __init__(self, case: Case) -> None:
        import torch
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers.fused_moe import fused_moe
        from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

        self.case, self.fused_experts = case, fused_moe.fused_experts
        self.topk_softmax, self.align = ops.topk_softmax, moe_align_block_size
        E, device = case.point.shape.experts, case.device
        self.map_E = None
        self.ids = [routed.experts for routed in case.routed]
        if case.plan.mode != "off":
            # The phantom expert E is on no rank, and vLLM's kernels skip it.
            self.map_E = torch.arange(E + 1, device=device, dtype=torch.int32)
            self.map_E[E] = -1
            self.ids = [ids.masked_fill(ids < 0, E) for ids in self.ids]
        layer = case.layer(0)
        self.block_m = fused_moe.try_get_optimal_moe_config(
            *(layer.w13.shape, layer.w2.shape, case.plan.top_k, None, case.point.tokens)
        )["BLOCK_SIZE_M"]

    def experts(self, r: int, weights: Any = None, ids: Any = None) -> Any:
        layer = self.case.layer(r)
        return self.fused_experts(
            hidden_states=self.case.hidden[r],
            w1=layer.w13,
            w2=layer.w2,
            topk_weights=self.case.routed[r].weights if weights is None else weights,
            topk_ids=self.ids[r] if ids is None else ids,
            global_num_experts=self.case.point.shape.experts + (self.map_E is not None),
            expert_map=self.map_E,
        )

    def topk(self, r: int) -> tuple[Any, Any]:
        logits, plan = self.case.logits[r], self.case.plan
        weights = logits.new_empty((logits.shape[0], plan.top_k), dtype=_torch().float32)
        ids = weights.new_empty(weights.shape, dtype=_torch().int32)
        indices = ids.new_empty(ids.shape)
        self.topk_softmax(weights, ids, indices, logits, plan.renormalize)
        return weights, ids

    def route(self, r: int) -> Any:
        return self.align(self.topk(r)[1], self.block_m, self.case.point.shape.experts)

    def whole(self, r: int) -> Any:
        return self.experts(r, *self.topk(r))


def _torch() -> Any:
    import torch

    return torch


def opponents(case: Case, names: list[str]) -> Iterator[tuple[str, Callable[[int], Any], bool]]:
    """Column, call, and whether its result is the layer's output by our routing."""
    if {"loop", "grouped"} & set(names):
        sets = [Sorted(case, r) for r in range(case.sets)]
        if "loop" in names:
            yield "loop_ms", functools.partial(loop, case, sets), True
        if "grouped" in names:
            yield "grouped_ms", functools.partial(grouped, case, sets), True
    if "vllm" in names:
        try:
            vllm = Vllm(case)
        except Exception as error:
            print(f"opponent vllm left out of {case.point.key()}: {error}", file=sys.stderr)
            return
        yield "vllm_experts_ms", vllm.experts, True
        # Also where ours has a limit: what its routing may cost is vLLM's without one.
        yield "vllm_route_ms", vllm.route, False
        if case.plan.mode == "off":
            yield "vllm_layer_ms", vllm.whole, False


def usable_opponents(args: argparse.Namespace, device: Any) -> list[str]:
    """Those of the asked opponents that can run here; the others are named with the reason."""
    missing = {}
    if (problem := grouped_mm_problem()) is not None:
        missing["grouped"] = problem
    if "vllm" in args.opponents:
        try:
            if device.type != "cuda":
                raise ImportError("its kernels need a GPU")
            import vllm.model_executor.layers.fused_moe.fused_moe  # noqa: F401
        except ImportError as error:
            missing["vllm"] = str(error)
    if args.round_capacity:
        return []
    for name, reason in missing.items():
        print(f"opponent {name} is not measured: {reason}")
    return [name for name in args.opponents if name not in missing]
