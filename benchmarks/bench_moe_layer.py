"""One MoE layer on a GPU: routing and experts, against cuBLAS, grouped products, vLLM, the roofs.

    python benchmarks/bench_moe_layer.py                        # the whole grid
    python benchmarks/bench_moe_layer.py --shapes olmoe --tokens 4096 --skews 3
    python benchmarks/bench_moe_layer.py --round-capacity       # C in whole tiles
    python benchmarks/bench_moe_layer.py --quick --interpret    # tiny, on a CPU

Each point of the grid: the gate (routing equal to torch's, bit for bit; experts within twice
torch's own error against float32, all rows, outputs poisoned before; what fails has no row, and
the exit status is 1), then the times, then a row of the CSV. At the end the goals, the plots.
Opponents get the same inputs:

    loop      one cuBLAS product after the other, per expert; loads known on the host, rows sorted
              before the time starts
    grouped   torch._grouped_mm, rows sorted before the time starts
    vllm      fused_experts, its alignment included; dropped assignments go to a phantom expert.
              Its routing is topk_softmax and, alone, moe_align_block_size: the plain top-k of the
              same logits, beside our routing with a limit, too

Columns, in milliseconds: `route_ms` logits to seats and counters, the call that the engine makes;
as all routing by CUDA graphs at every size, since a call is shorter than its launches from the
host (`route_timer`: where that failed); `experts_ms` the experts from seats; `layer_ms` both in
one go. `work_share`: held assignments over those of the top-k. `tflops` and
`gbps`: of the experts, 6 * A * H * I operations and the fewest bytes (weights of experts with
tokens, rows in and out). `x_over_ours`: the opponent's time over ours, above 1 is faster. Skew 1 is
even; a skew is bounded by E / k, `max_over_mean` is what came out.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _common as common
import _shapes
import _tables
from _opponents import OPPONENTS, opponents, usable_opponents

TOKENS = (1, 16, 64, 256, 1024, 4096, 8192, 16384)
SKEWS = (1.0, 3.0, 7.0)
GAMMAS = (2.0, 1.5, 1.0)
GRAPH_TOKENS = 1024  # up to here times of experts and layers are of CUDA graphs
KEY = ("shape", "tokens", "skew", "mode", "gamma", "rounding")
COLUMNS = (
    *KEY,
    *("capacity", "max_over_mean", "dropped_share", "work_share", "m_tiles", "timer"),
    *("route_timer", "vllm_route_timer"),
    *("route_ms", "experts_ms", "layer_ms", "route_share"),
    *("tflops", "roof_share", "gbps", "copy_share"),
    *("loop_ms", "grouped_ms", "vllm_experts_ms", "vllm_route_ms", "vllm_layer_ms"),
    *("loop_over_ours", "grouped_over_ours", "vllm_experts_over_ours"),
    *("vllm_route_over_ours", "vllm_layer_over_ours"),
)


@dataclass(frozen=True)
class Point:
    """One row. rounding: of C to whole M-tiles: none, up or down."""

    shape: _shapes.Shape
    tokens: int
    skew: float
    mode: str = "off"
    gamma: float = float("inf")
    rounding: str = "none"

    def key(self) -> dict[str, Any]:
        values = (self.shape.name, self.tokens, self.skew, self.mode, self.gamma, self.rounding)
        return {name: _tables.text(value) for name, value in zip(KEY, values, strict=True)}


def parse_args() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--skews", type=float, nargs="+", default=list(SKEWS))
    parser.add_argument("--gammas", type=float, nargs="*", default=list(GAMMAS))
    parser.add_argument("--modes", nargs="+", choices=["off", "drop", "expanded"])
    parser.add_argument("--opponents", nargs="*", choices=OPPONENTS, default=list(OPPONENTS))
    parser.add_argument("--seconds", type=float, default=0.12, help="time for each median")
    parser.add_argument("--round-capacity", action="store_true", help="C in whole tiles")
    parser.add_argument("--label", default="", help="in the name of the CSV file")
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.tokens, args.skews, args.gammas = ["tiny"], [1, 33], [3.0], [1.0]
        if args.round_capacity:
            args.modes = ["drop"]
            args.tokens, args.gammas = [40], [2.0]  # C = 20: between one M-tile of 16 and two
    args.modes = args.modes or ["off", "drop", "expanded"]
    return args


def points(args: argparse.Namespace) -> list[Point]:
    """The grid, what tells most first: dropless and even; one capacity; the rest."""
    shapes = {**_shapes.SHAPES, "tiny": _shapes.TINY}
    found = []
    for name in args.shapes:
        for tokens in args.tokens:
            for skew in args.skews:
                ends: list[tuple[str, float]] = [("off", float("inf"))]
                ends += [(mode, g) for g in args.gammas for mode in ("drop", "expanded")]
                for mode, gamma in ends:
                    point = Point(shapes[name], tokens, skew, mode, gamma)
                    if mode in args.modes and (mode == "off" or _limited(point)):
                        found.append(point)
    if args.round_capacity:
        roundings = ("none", "up", "down")
        return [
            Point(p.shape, p.tokens, p.skew, p.mode, p.gamma, r)
            for p in found
            if p.mode != "off" and p.skew > 1
            for r in roundings
        ]

    def priority(point: Point) -> int:
        if point.mode == "off":
            return {1.0: 0, 3.0: 1}.get(point.skew, 3)
        return 2 if point.mode == "drop" and (point.skew, point.gamma) == (3.0, 1.5) else 4

    return sorted(found, key=priority)


def _limited(point: Point) -> bool:
    plan = _shapes.make_plan(point.shape, point.mode, point.gamma)
    return _shapes.capacity_of(plan, point.tokens) is not None


class Case:
    """A point with its inputs on the device: R sets that take turns, two layers of weights."""

    def __init__(self, point: Point, layers: list[_shapes.Layer], device: Any, dtype: Any) -> None:
        import torch
        from _timing import rotations

        from capmoe_kernels.experts import chip_of, fused_experts, workspace_sizes
        from capmoe_kernels.launch import choose_config
        from capmoe_kernels.routing import TOTALS, route_triton

        self.point, self.layers, self.device, self.dtype = point, layers, device, dtype
        shape, T = point.shape, point.tokens
        self.plan = _shapes.make_plan(shape, point.mode, point.gamma)
        self.capacity = _shapes.capacity_of(self.plan, T)

        def config(capacity: int | None) -> Any:
            chip, name = chip_of(device)
            return choose_config(
                *(T, self.plan.width, shape.experts, shape.hidden, shape.intermediate),
                chip=chip,
                device_name=name,
                itemsize=dtype.itemsize,
                max_rows=capacity,
            )

        self.block_m = config(self.capacity).gate_up.block_m
        self.redundant = False
        if point.rounding != "none" and self.capacity is not None:
            M = self.block_m
            up, down = -(-self.capacity // M) * M, self.capacity // M * M
            self.redundant = up == down or (point.rounding == "down" and down == 0)
            self.capacity = up if point.rounding == "up" else max(M, down)
            if self.capacity >= T:  # rounded up to where nothing is limited
                self.capacity = None
                self.plan = _shapes.make_plan(shape, "off", float("inf"))
            else:
                self.plan = _shapes.with_capacity(self.plan, self.capacity, T)

        busy = min(shape.experts, T * shape.top_k)
        self.sets = rotations(shape.bytes(T, busy, dtype.itemsize), device)
        self.hidden = [
            torch.randn(T, shape.hidden, device=device, dtype=dtype) for _ in range(self.sets)
        ]
        self.logits = [
            _shapes.router_logits(T, shape, point.skew, device, dtype, seed=r)
            for r in range(self.sets)
        ]
        none = torch.zeros(T, dtype=torch.bool, device=device)
        self.route = functools.partial(  # as the engine's router calls it
            route_triton,
            plan=self.plan,
            scoring="softmax",
            is_padding_T=none,
            is_decode_T=none,
            counters=torch.zeros(2 * shape.experts + len(TOTALS), dtype=torch.int64, device=device),
        )
        self.routed = [self.route(logits) for logits in self.logits]
        first, second = workspace_sizes(
            *(T, self.plan.width, shape.hidden, shape.intermediate, dtype),
            config(self.capacity),
        )
        empty = functools.partial(torch.empty, device=device, dtype=dtype)
        self.workspaces = empty(first), empty(second)
        self.out = torch.empty(T, shape.hidden, device=device, dtype=dtype)
        self._fused_experts = fused_experts
        self.expected: Any = None  # all rows of set 0 as they should be, once asked for

    def layer(self, r: int) -> _shapes.Layer:
        return self.layers[r % len(self.layers)]

    def experts(self, r: int, routed: Any = None) -> Any:
        routed = self.routed[r] if routed is None else routed
        layer = self.layer(r)
        return self._fused_experts(
            *(self.hidden[r], layer.w13, layer.w2, routed.weights, routed.experts, routed.seats),
            activation="silu",
            max_rows_per_expert=self.capacity,
            out=self.out,
            workspaces=self.workspaces,
        )

    def whole(self, r: int) -> Any:
        return self.experts(r, self.route(self.logits[r]))

    def gate(self) -> None:
        """Raises GateError where the routing or the experts are wrong."""
        import _gates as gates

        from capmoe_kernels.routing import route_triton
        from vllm_capmoe.torch_routing import route_torch

        name = " ".join(self.point.key().values())
        scores = self.logits[0].float().softmax(-1)
        exact = route_torch(scores, self.plan)
        gates.gate_routing(name, route_triton(scores, self.plan), exact)
        # Scores made inside may differ in the last bits: near ties may go the other way.
        gates.gate_choice(name, self.routed[0].experts, exact.experts)
        for tensor in (*self.workspaces, self.out):
            tensor.fill_(float("nan"))
        self.check("ours", self.experts)

    def check(self, name: str, call: Callable[[int], Any]) -> None:
        import _gates as gates

        if self.expected is None:
            routed = self.routed[0]
            given = self.layer(0), self.hidden[0], routed.weights, routed.experts
            self.expected = gates.reference(*given)
        gates.gate_experts(name, call(0), self.expected)


# --- measuring ----------------------------------------------------------------------------------


def measure(case: Case, args: argparse.Namespace, roofs: Any) -> dict[str, Any]:
    """The gate and all times of one point: a row of the CSV."""
    from _timing import time_calls

    point, shape = case.point, case.point.shape
    case.gate()
    graph = point.tokens <= GRAPH_TOKENS

    def timed(call: Callable[[int], Any], graph: bool = graph) -> Any:
        calls = [functools.partial(call, r) for r in range(case.sets)]
        return time_calls(calls, case.device, graph=graph, seconds=args.seconds)

    before, after = case.routed[0].load_before, case.routed[0].load_after
    asked, held = int(before.sum()), int(after.sum())
    kept = int(case.routed[0].kept)
    busy = int((after > 0).sum())
    experts = timed(case.experts)
    route = timed(lambda r: case.route(case.logits[r]), graph=True)
    seconds = experts.ms / 1e3
    rate, traffic = shape.flops(held) / seconds, shape.bytes(point.tokens, busy) / seconds
    row: dict[str, Any] = point.key() | {
        "capacity": case.capacity,
        "max_over_mean": float(before.max()) * shape.experts / asked,
        "dropped_share": 1 - kept / asked,
        "work_share": held / asked,
        "m_tiles": int((after + case.block_m - 1).div(case.block_m, rounding_mode="floor").sum()),
        "timer": experts.how,
        "experts_ms": experts.ms,
        "route_timer": route.how,
        "route_ms": route.ms,
        "layer_ms": timed(case.whole).ms,
        "tflops": rate / 1e12,
        "roof_share": rate / roofs.flops,
        "gbps": traffic / 1e9,
        "copy_share": traffic / roofs.bytes,
    }
    row["route_share"] = row["route_ms"] / row["layer_ms"]
    for column, call, comparable in opponents(case, args.opponents):
        try:
            if comparable:
                case.check(column, call)
            routing = column == "vllm_route_ms"
            timing = timed(call, graph=graph or routing)
            row[column] = timing.ms
            if routing:
                row["vllm_route_timer"] = timing.how
        except Exception as error:  # its own trouble, from the gate to out of memory
            print(f"opponent {column} left out of {point.key()}: {error}", file=sys.stderr)
    ours = {"vllm_route": "route_ms", "vllm_layer": "layer_ms"}
    for name in ("loop", "grouped", "vllm_experts", "vllm_route", "vllm_layer"):
        if f"{name}_ms" in row:
            row[f"{name}_over_ours"] = row[f"{name}_ms"] / row[ours.get(name, "experts_ms")]
    return row


def main() -> None:
    args = parse_args()
    name = "whole_tiles" if args.round_capacity else "moe_layer"
    device = common.setup(args, f"{name}_{args.label}" if args.label else name)
    import moe_layer_report as report
    import torch
    from _timing import measure_roofs

    dtype = torch.bfloat16
    args.opponents = usable_opponents(args, device)
    roofs = measure_roofs(device)
    text = (
        f"roofs: bf16 product {roofs.flops / 1e12:.4g} TFLOP/s, copy {roofs.bytes / 1e9:.5g} GB/s"
    )
    print(text)
    about = f"bfloat16, silu; opponents {' '.join(args.opponents) or 'none'}; logits bfloat16"
    head = _tables.header(device, [text, about])
    table = _tables.Table(args.out, COLUMNS, KEY, head)
    deadline = common.Deadline(args.budget)
    todo = [p for p in points(args) if not table.has(p.key())]
    layers: list[_shapes.Layer] = []
    last = ""
    status = 0
    for point in common.progress(todo, "layer"):
        if deadline.passed():
            print(f"budget of {args.budget:.0f} s used up; run again to go on")
            break
        if point.shape.name != last:
            layers.clear()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            layers = [_shapes.make_layer(point.shape, device, dtype) for _ in range(2)]
            last = point.shape.name
        try:
            table.begin(point.key())
            case = Case(point, layers, device, dtype)
            if not case.redundant:  # C is in whole tiles as it is, or less than one
                table.add(measure(case, args, roofs))
        except Exception as error:  # a gate, out of memory or resources: the others still count
            status = 1
            if not common.goes_on(error, str(point.key()), device):
                break
    print(f"{len(table.rows)} rows in {args.out}")
    if device.type != "cuda":
        print("times of the interpreter mean nothing; what follows only shows that it runs")
    if args.round_capacity:
        report.whole_tiles(table.rows)
    else:
        report.goals(table.rows)
        if not args.no_plot and not status:
            report.plots(Path(args.out))
    sys.exit(status)


if __name__ == "__main__":
    main()
