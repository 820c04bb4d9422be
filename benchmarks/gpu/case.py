"""One shape and number of tokens on the device: inputs, contenders, and what each must give.

The experts get their routing and seats from torch, so a fault of the routing kernels costs no row
of theirs. What `_opponents.py` wants of a case is here by the same names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import _gates as gates
import _opponents
import _shapes
import torch
from _timing import rotations
from gpu.items import LIMIT_GAMMA, config_of

from capmoe_kernels import experts as kernels
from capmoe_kernels.contract import Seats
from capmoe_kernels.routing import TOTALS, route_triton
from vllm_capmoe.torch_routing import route_torch


class Missing(Exception):
    """A contender that is not there on this host."""


@dataclass(frozen=True)
class Call:
    """run(r): the contender on input set r; gate(): all rows of set 0, the error over the allowed.

    answer(result): the tensors that must be the same at every repeat. config: our launches.
    """

    run: Callable[[int], Any]
    gate: Callable[[], float]
    answer: Callable[[Any], list[torch.Tensor]]
    config: Any = None


@dataclass(frozen=True)
class Point:
    shape: _shapes.Shape
    tokens: int

    def key(self) -> tuple[str, int]:
        return self.shape.name, self.tokens


@dataclass(frozen=True)
class Routed:
    weights: torch.Tensor
    experts: torch.Tensor
    seats: Seats


class Case:
    """T tokens of one shape, with R sets of inputs that take turns.

    layers: weights, two that take turns, or one. no_vllm: why vLLM is not there, or nothing.
    """

    def __init__(
        self,
        shape: _shapes.Shape,
        tokens: int,
        layers: list[_shapes.Layer],
        device: torch.device,
        no_vllm: str,
    ) -> None:
        self.shape, self.layers, self.device, self.no_vllm = shape, layers, device, no_vllm
        self.point = Point(shape, tokens)
        self.plan = _shapes.make_plan(shape, "off", float("inf"))
        dtype = layers[0].w13.dtype
        busy = min(shape.experts, tokens * shape.top_k)
        self.sets = rotations(shape.bytes(tokens, busy), device) if len(layers) > 1 else 1
        self.hidden = [
            torch.randn(tokens, shape.hidden, device=device, dtype=dtype) for _ in range(self.sets)
        ]
        self.logits = [
            _shapes.router_logits(tokens, shape, 1.0, device, dtype, seed=r)
            for r in range(self.sets)
        ]
        self.routed = [self._routed(r) for r in range(self.sets)]
        self.out = torch.empty_like(self.hidden[0])
        self.no_T = torch.zeros(tokens, dtype=torch.bool, device=device)
        self.counters = torch.zeros(
            2 * shape.experts + len(TOTALS), dtype=torch.int64, device=device
        )

    def layer(self, r: int) -> _shapes.Layer:
        return self.layers[r % len(self.layers)]

    def _routed(self, r: int) -> Routed:
        picked = route_torch(self.logits[r].float().softmax(-1), self.plan)
        order, offsets, seat = gates.seats_of(picked.experts, self.shape.experts)
        return Routed(
            weights=picked.weights.contiguous(),
            experts=picked.experts.int().contiguous(),
            seats=Seats(order=order, offsets=offsets, seat=seat),
        )

    @functools.cached_property
    def expected(self) -> gates.Reference:
        routed = self.routed[0]
        given = self.layer(0), self.hidden[0], routed.weights, routed.experts
        return gates.reference(*given)

    @property
    def work(self) -> tuple[int, int]:
        """Operations, and the fewest bytes, of the experts."""
        loads = self.routed[0].seats.offsets.diff()
        shape = self.shape
        return shape.flops(int(loads.sum())), shape.bytes(self.point.tokens, int((loads > 0).sum()))

    # --- contenders -----------------------------------------------------------------------------

    def call(self, part: str, who: str) -> Call:
        """Raises Missing where the contender isn't there."""
        if part == "experts" and who in ("loop", "grouped"):
            return self._torch(who)
        if who == "vllm":
            return self._vllm(part)
        if part == "experts":
            return self._experts(who)
        if part == "layer":
            return self._layer()
        return self._routing(1.0 if part == "routing" else LIMIT_GAMMA, part == "limit")

    def _experts(self, choice: str) -> Call:
        shape, T = self.shape, self.point.tokens
        config = config_of(shape, T, kernels.chip_of(self.device)[0], choice)
        first, second = kernels.workspace_sizes(
            *(T, shape.top_k, shape.hidden, shape.intermediate, self.out.dtype, config)
        )
        spaces = self.out.new_empty(first), self.out.new_empty(second)

        def run(r: int, routed: Any = None) -> torch.Tensor:
            routed = self.routed[r] if routed is None else routed
            layer = self.layer(r)
            return kernels.fused_experts(
                *(self.hidden[r], layer.w13, layer.w2),
                *(routed.weights, routed.experts, routed.seats),
                activation="silu",
                config=config,
                out=self.out,
                workspaces=spaces,
            )

        def gate() -> float:
            for tensor in (*spaces, self.out):
                tensor.fill_(float("nan"))
            return gates.gate_experts(choice, run(0), self.expected)

        return Call(run, gate, lambda out: [out], config)

    def _route(self, plan: Any, r: int) -> Any:
        """As the engine's router calls it."""
        return route_triton(
            self.logits[r],
            plan,
            scoring="softmax",
            is_padding_T=self.no_T,
            is_decode_T=self.no_T,
            counters=self.counters,
        )

    def _routing(self, gamma: float, limited: bool) -> Call:
        plan = _shapes.make_plan(self.shape, "drop", gamma) if limited else self.plan

        def gate() -> float:
            scores = self.logits[0].float().softmax(-1)
            exact = route_torch(scores, plan)
            given, own = route_triton(scores, plan), self._route(plan, 0)
            gates.gate_routing("routing", given, exact)
            gates.gate_choice("routing", own.experts, exact.experts)
            for routed in (given, own):
                gates.gate_seats("routing", routed.seats, routed.experts, self.shape.experts)
            return 0.0

        def answer(routed: Any) -> list[torch.Tensor]:
            held = int(routed.seats.offsets[-1])
            return [
                *(routed.experts, routed.weights, routed.load_before, routed.load_after),
                *(routed.seats.offsets, routed.seats.order[:held]),
            ]

        return Call(functools.partial(self._route, plan), gate, answer)

    def _layer(self) -> Call:
        experts, routing = self._experts("ours"), self._routing(1.0, False)

        def run(r: int) -> torch.Tensor:
            return experts.run(r, self._route(self.plan, r))  # type: ignore[call-arg]

        def gate() -> float:
            routing.gate()
            routed = self._route(self.plan, 0)
            given = self.layer(0), self.hidden[0], routed.weights, routed.experts
            self.out.fill_(float("nan"))
            return gates.gate_experts("layer", run(0), gates.reference(*given))

        return Call(run, gate, lambda out: [out], experts.config)

    def _torch(self, who: str) -> Call:
        if who == "grouped" and (problem := _opponents.grouped_mm_problem()) is not None:
            raise Missing(problem)
        if who == "grouped" and self.device.type != "cuda":
            raise Missing("torch._grouped_mm is measured on a GPU only")
        sets = [_opponents.Sorted(self, r) for r in range(self.sets)]
        contender = _opponents.loop if who == "loop" else _opponents.grouped
        run = functools.partial(contender, self, sets)
        return Call(run, lambda: gates.gate_experts(who, run(0), self.expected), lambda out: [out])

    def _vllm(self, part: str) -> Call:
        if self.no_vllm:
            raise Missing(self.no_vllm)
        vllm = _opponents.Vllm(self)

        def gate_topk() -> tuple[torch.Tensor, torch.Tensor]:
            weights, ids = vllm.topk(0)
            gates.gate_choice("vllm", ids, self.routed[0].experts)
            return weights, ids

        def gate_layer() -> float:
            weights, ids = gate_topk()
            given = self.layer(0), self.hidden[0], weights, ids
            return gates.gate_experts("vllm", vllm.whole(0), gates.reference(*given))

        def gate_routing() -> float:
            gate_topk()
            places = vllm.route(0)[0].long()
            A = self.point.tokens * self.shape.top_k
            if not torch.equal(places[places < A].sort().values, torch.arange(A).to(places)):
                raise gates.GateError("vllm: alignment doesn't name every assignment once")
            return 0.0

        def gate_experts() -> float:
            return gates.gate_experts("vllm", vllm.experts(0), self.expected)

        run, gate = {
            "experts": (vllm.experts, gate_experts),
            "layer": (vllm.whole, gate_layer),
            "routing": (vllm.route, gate_routing),
        }[part]
        return Call(run, gate, lambda out: [])
