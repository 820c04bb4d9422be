"""Expert parallelism on one GPU: the slowest rank of a layer, with and without a capacity.

    python benchmarks/emulate_ep.py
    python benchmarks/emulate_ep.py --shapes mixtral-8x7b --tokens-per-rank 512 2048 --skews 2.5
    python benchmarks/emulate_ep.py --quick --interpret        # tiny, on a CPU

G ranks hold E / G experts each and T tokens each, as in the paper (arXiv 2503.05066): data parallel
attention, expert parallel experts. Every rank routes its own tokens under its own capacity, extra
candidates are those of the token's own rank. Then, rank after rank on this one GPU, its share of
the layer is timed with the tokens of all ranks that have one of its experts: seats from the experts
that came with them (`make_seats`, as in the engine), then the experts. A layer takes as long as its
slowest rank. Left out: the exchange between ranks, which a capacity makes smaller, too; and rows
without an expert there, which an exchange that gathers all rows on all ranks brings along in any
mode.

`slowest_ms`, `mean_ms`: a rank's seats and experts; `seats_ms`: the seats alone, on the slowest
rank. `route_ms`: the routing of one rank's tokens. `speedup`: slowest rank without capacity over
slowest rank with it. `ideal`: the same ratio of the largest rank loads, in assignments. `quotient`:
speedup over ideal. `routed_speedup`: each side plus its routing. `paper`: the paper's speed-up of
one layer on 8 H20, at an imbalance that it doesn't state; where `ideal` is below it, the imbalance
here is smaller. Gate: routing equal to torch's, experts of the rank with the largest load within
twice torch's error against float32.
"""

from __future__ import annotations

import argparse
import functools
import operator
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _common as common
import _shapes
import _tables

GAMMAS = (2.0, 1.5, 1.0)
KEY = ("shape", "ranks", "tokens_per_rank", "skew", "level", "mode", "gamma")
COLUMNS = (
    *KEY,
    *("max_over_mean", "rank_max_over_mean", "dropped_share", "work_share"),
    *("largest_load", "slowest_rank", "slowest_ms", "mean_ms", "seats_ms", "route_ms"),
    *("speedup", "ideal", "quotient", "routed_speedup", "paper"),
)


@dataclass(frozen=True)
class Setting:
    """A model on G ranks with T tokens each, and the skew of its router."""

    shape: _shapes.Shape
    tokens: int
    skew: float

    @property
    def ranks(self) -> int:
        return self.shape.ranks


@dataclass(frozen=True)
class Variant:
    """A mode of the capacity; `off` is the base of the comparison."""

    level: str = "expert"
    mode: str = "off"
    gamma: float = float("inf")


def parse_args() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--tokens-per-rank", type=int, nargs="+", default=[2048, 512])
    parser.add_argument("--skews", type=float, nargs="+", help="default: as seen in each model")
    parser.add_argument("--gammas", type=float, nargs="+", default=list(GAMMAS))
    parser.add_argument("--levels", nargs="+", choices=["expert", "device"], default=["expert"])
    parser.add_argument("--seconds", type=float, default=0.1, help="time for each median")
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.tokens_per_rank, args.gammas = ["tiny"], [12], [1.0]
        args.levels = ["expert", "device"]
    return args


class Emulation:
    """One setting: router logits of all ranks, and weights of one rank's size."""

    def __init__(self, setting: Setting, args: argparse.Namespace, device: Any) -> None:
        import torch

        self.setting, self.args, self.device = setting, args, device
        self.dtype = torch.bfloat16
        shape, G = setting.shape, setting.ranks
        if shape.experts % G:
            sys.exit(f"{shape.name} has {shape.experts} experts, which {G} ranks can't share")
        self.local = shape.experts // G
        self.T = setting.tokens * G
        self.device_E = torch.arange(shape.experts, device=device, dtype=torch.int32) // self.local
        self.owner_T = torch.arange(self.T, device=device, dtype=torch.int32) // setting.tokens
        self.logits = _shapes.router_logits(self.T, shape, setting.skew, device, torch.bfloat16)
        self.scores = self.logits.float().softmax(-1)
        self.layers = [_shapes.make_layer(shape, device, self.dtype, self.local) for _ in range(2)]
        self.hidden = [
            torch.randn(self.T, shape.hidden, device=device, dtype=self.dtype) for _ in range(2)
        ]

    def plan(self, variant: Variant) -> Any:
        options = {} if variant.mode == "off" else {"scope": "request", "level": variant.level}
        return _shapes.make_plan(
            self.setting.shape,
            variant.mode,
            variant.gamma,
            expert_device=self.device_E.tolist(),
            has_token_device=True,
            **options,
        )

    def route(self, variant: Variant) -> Any:
        """The routing of all ranks at once, after its gate."""
        import _gates as gates

        from capmoe_kernels.routing import route_triton
        from vllm_capmoe.torch_routing import route_torch

        plan = self.plan(variant)
        given: dict[str, Any] = {}
        if variant.mode != "off":
            given = {
                "request_T": self.owner_T.long(),
                "num_requests": self.setting.ranks,
                "device_E": self.device_E.long(),
                "token_device_T": self.owner_T.long(),
            }
        routed = route_triton(self.scores, plan, **given)
        name = f"{self.setting.shape.name} {variant}"
        gates.gate_routing(name, routed, route_torch(self.scores, plan, **given))
        return routed

    def route_ms(self, variant: Variant) -> float:
        """The routing of one rank's tokens, by the call that the engine makes there."""
        import torch

        from capmoe_kernels.routing import TOTALS, route_triton

        count, device = self.setting.tokens, self.logits.device
        none = torch.zeros(count, dtype=torch.bool, device=device)
        counters = 2 * self.setting.shape.experts + len(TOTALS)
        plan = self.plan(variant)
        given: dict[str, Any] = {
            "scoring": "softmax",
            "is_padding_T": none,
            "is_decode_T": none,
            "counters": torch.zeros(counters, dtype=torch.int64, device=device),
        }
        if variant.mode != "off":
            given |= {
                "request_T": self.owner_T[:count] * 0,
                "device_E": self.device_E,
                "token_device_T": self.owner_T[:count],
            }
        call = functools.partial(route_triton, self.logits[:count], plan, **given)
        return self.time([call], True)

    def most_rows(self, routed: Any, variant: Variant) -> int | None:
        """What the host knows of an expert's load: the sum of the ranks' capacities, or nothing."""
        if variant.mode == "off" or variant.level == "device":
            return None
        total = int(routed.capacity.long().sum())
        return total if total < self.T else None

    def received(self, rank: int, routed: Any) -> tuple[Any, Any]:
        """The tokens that have an expert of `rank`, ascending, and that rank's expert map."""
        first = rank * self.local
        mine_TW = (routed.experts >= first) & (routed.experts < first + self.local)
        map_E = (self.device_E != rank).int().neg()  # -1 elsewhere
        map_E[first : first + self.local] += self.device_E.new_tensor(range(self.local))
        return mine_TW.any(1).nonzero().squeeze(1), map_E

    def rank_ms(self, rank: int, routed: Any, bound: int | None, *, gate: bool) -> float:
        """Seats and experts of one rank, with the tokens of all ranks that have one of them."""
        import _gates as gates

        from capmoe_kernels.experts import fused_experts

        tokens, map_E = self.received(rank, routed)
        if tokens.numel() == 0:
            return 0.0
        experts = routed.experts[tokens].contiguous()
        weights = routed.weights[tokens].contiguous()
        hidden = [h[tokens].contiguous() for h in self.hidden]
        out = hidden[0].new_full(hidden[0].shape, float("nan"))

        def call(r: int) -> Any:
            layer = self.layers[r]
            return fused_experts(  # without seats: it makes them, as the engine has it do
                *(hidden[r], layer.w13, layer.w2, weights, experts),
                activation="silu",
                expert_map=map_E,
                max_rows_per_expert=bound,
                out=out,
            )

        if gate:
            here = map_E.long()[experts.clamp(min=0).long()].masked_fill(experts < 0, -1)
            expected = gates.reference(self.layers[0], hidden[0], weights, here)
            gates.gate_experts(f"rank {rank}", call(0), expected)
        return self.time([functools.partial(call, r) for r in range(2)], tokens.numel() <= 1024)

    def seats_ms(self, rank: int, routed: Any) -> float:
        """The seats of one rank, a part of its `rank_ms`."""
        from capmoe_kernels.seats import make_seats

        tokens, map_E = self.received(rank, routed)
        experts = routed.experts[tokens].contiguous()
        return self.time([functools.partial(make_seats, experts, self.local, map_E)], True)

    def time(self, calls: list[Any], graph: bool) -> float:
        from _timing import time_calls

        return time_calls(calls, self.device, graph=graph, seconds=self.args.seconds).ms

    def measure(self, variant: Variant) -> dict[str, Any]:
        """Loads and times of one variant; nothing is compared yet."""
        routed = self.route(variant)
        bound = self.most_rows(routed, variant)
        load_G = routed.load_after.view(self.setting.ranks, self.local).sum(1)
        busiest = int(load_G.argmax())
        times = [
            self.rank_ms(rank, routed, bound, gate=rank == busiest)
            for rank in range(self.setting.ranks)
        ]
        slowest = times.index(max(times))
        asked, held = int(routed.load_before.sum()), int(routed.load_after.sum())
        return {
            "max_over_mean": float(routed.load_before.max()) * routed.load_before.numel() / asked,
            "rank_max_over_mean": float(load_G.max()) * self.setting.ranks / max(held, 1),
            "dropped_share": 1 - int(routed.kept) / asked,
            "work_share": held / asked,
            "largest_load": int(load_G.max()),
            "slowest_rank": slowest,
            "slowest_ms": max(times),
            "mean_ms": sum(times) / len(times),
            "seats_ms": self.seats_ms(slowest, routed),
            "route_ms": self.route_ms(variant),
        }


def key_of(setting: Setting, variant: Variant) -> dict[str, Any]:
    values = (
        *(setting.shape.name, setting.ranks, setting.tokens, setting.skew),
        *(variant.level, variant.mode, variant.gamma),
    )
    return {name: _tables.text(value) for name, value in zip(KEY, values, strict=True)}


def variants(args: argparse.Namespace) -> list[Variant]:
    found = [Variant()]
    for level in args.levels:
        found += [Variant(level, m, g) for g in args.gammas for m in ("drop", "expanded")]
    return found


def compare(row: dict[str, Any], base: dict[str, Any], paper: float | None) -> None:
    """Fill in what a variant gains over no capacity."""
    row["speedup"] = base["slowest_ms"] / row["slowest_ms"]
    row["ideal"] = base["largest_load"] / row["largest_load"]
    row["quotient"] = row["speedup"] / row["ideal"]
    both = [r["slowest_ms"] + r["route_ms"] for r in (base, row)]
    row["routed_speedup"] = both[0] / both[1]
    row["paper"] = paper


def paper_figure(shape: _shapes.Shape, variant: Variant) -> float | None:
    if shape.speedup is None or variant.level != "expert" or variant.mode == "off":
        return None
    pair = shape.speedup.get(variant.gamma)
    return None if pair is None else pair[variant.mode == "expanded"]


def goals(rows: list[dict[str, str]]) -> None:
    """Print the goals with what was measured."""
    bound = [row for row in rows if row["mode"] != "off"]
    quotients = [float(row["quotient"]) for row in bound]
    for text, reduce in (("geomean", _tables.geomean), ("min", min)):
        value = reduce(quotients) if quotients else 0.0
        goal = f"speed-up over the ideal, {text} >= 0.9"
        _tables.verdict(goal, value, lambda v: v >= 0.9, len(quotients))
    for row in bound:
        if not row["paper"]:
            continue
        ours, ideal, paper = (float(row[name]) for name in ("speedup", "ideal", "paper"))
        name = f"{row['shape']} T={row['tokens_per_rank']} {row['mode']} gamma {row['gamma']}"
        if ideal < paper:
            print(f"      {name}: {ours:.2f}; the ideal here is {ideal:.2f}, the paper has {paper}")
        else:
            _tables.verdict(
                f"{name} >= the paper's {paper}", ours, functools.partial(operator.le, paper), 1
            )


def plot(path: Path) -> None:
    """Speed-up by gamma for Token Drop at the first number of tokens: ours, ideal, paper."""
    _, rows = _tables.read_table(path)
    rows = [row for row in rows if row["mode"] == "drop" and row["level"] == "expert"]
    rows = [row for row in rows if row["tokens_per_rank"] == rows[0]["tokens_per_rank"]]
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for column in ("speedup", "ideal", "paper"):
            if row[column]:
                point = float(row["gamma"]), float(row[column])
                lines.setdefault(f"{row['shape']} {column}", []).append(point)
    if lines:
        target = path.with_name(f"{path.stem}-speedup.png")
        title = f"Emulated expert parallel layer, Token Drop ({path.stem})"
        _tables.plot_lines(target, title, ("gamma", "speed-up over no capacity"), lines, 1.0)
        print(f"wrote {target}")


def main() -> None:
    args = parse_args()
    device = common.setup(args, "emulate_ep")
    import torch

    table = _tables.Table(args.out, COLUMNS, KEY, _tables.header(device, ["bfloat16, silu"]))
    shapes = {**_shapes.SHAPES, "tiny": _shapes.TINY}
    settings = [
        Setting(shapes[name], tokens, skew)
        for tokens in args.tokens_per_rank
        for name in args.shapes
        for skew in (args.skews or [shapes[name].peak])
    ]
    deadline = common.Deadline(args.budget)
    status = 0
    emulation: Emulation | None = None
    for setting in common.progress(settings, "ranks"):
        todo = [v for v in variants(args) if not table.has(key_of(setting, v))]
        if not todo or deadline.passed():
            continue
        table.begin(key_of(setting, todo[0]))
        try:
            emulation = Emulation(setting, args, device)
            base = emulation.measure(Variant())  # in the same run as what it is compared with
            for variant in todo:
                if variant != todo[0]:
                    table.begin(key_of(setting, variant))
                row = base if variant.mode == "off" else emulation.measure(variant)
                row = key_of(setting, variant) | row
                compare(row, base, paper_figure(setting.shape, variant))
                table.add(row)
                if deadline.passed():
                    break
        except (
            Exception
        ) as error:  # a gate, out of memory, out of resources: the others still count
            status = 1
            if not common.goes_on(error, str(setting), device):
                break
        emulation = None  # its memory
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"{len(table.rows)} rows in {args.out}")
    if device.type != "cuda":
        print("times of the interpreter mean nothing; what follows only shows that it runs")
    goals(table.rows)
    if not args.no_plot and not status:
        plot(Path(args.out))
    sys.exit(status)


if __name__ == "__main__":
    main()
