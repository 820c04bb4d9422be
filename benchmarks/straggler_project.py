"""What a limit gains on 2 to 64 expert parallel ranks: a projection, beside the paper's figures.

    python benchmarks/straggler_project.py                    # the paper's four models
    python benchmarks/straggler_project.py --record T.pt --model FOLDER
    python benchmarks/straggler_project.py --trace T.pt --shapes mixtral-8x7b
    python benchmarks/straggler_project.py --quick

Measured, on this machine: the time of one expert's computation at the model's real sizes, in
bfloat16 on one core, for a rising number of assignments; and, as a check, that a rank of several
experts takes the sum of their times.

Routed, in full, by this project's reference: every rank's own tokens, with limits counted on them
alone (data parallel attention), `local` candidates, experts placed linearly. The router's logits
are random with a skew such that the largest expert load is what the paper saw in that model, or
they are those of a recorded trace, cut into as many parts as there are ranks.

Projected: a layer takes as long as its slowest rank, and a rank the sum of its experts' times. The
exchange of tokens, the routing itself, shared experts and attention are left out. So a speed-up
here is of the routed experts alone and of one core's cost curve; the paper's figures are of a whole
layer on 8 H20 (6 for Qwen1.5-MoE). Their ratio is no test of either; the trend over the ranks is
what this is for.
"""

from __future__ import annotations

import argparse
import bisect
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from _shapes import SHAPES, TINY, Shape, make_layer, make_plan, router_logits
from _tables import header, output_folder, pyplot_for, today, write_rows

PAPER = ("mixtral-8x7b", "olmoe", "deepseek-v2-lite", "qwen1.5-moe")
RANKS = (2, 4, 6, 8, 16, 32, 64)
GAMMAS = (2.0, 1.5, 1.0)
MODES = ("drop", "expanded")
ASSIGNMENTS = (1, 4, 16, 64, 256, 512, 1024)
COLUMNS = (
    *("model", "ranks", "experts_per_rank", "mode", "gamma", "level", "dropped"),
    *("rank_load", "projected_ms", "projected_speedup", "paper_speedup"),
)
ADDITIVE = 0.25  # how far a rank's time may be from the sum of its experts'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, "tiny"], default=list(PAPER))
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--tokens", type=int, default=1024, help="of each rank")
    parser.add_argument("--level", choices=("expert", "device"), default="expert")
    parser.add_argument("--repeats", type=int, default=5, help="of each measured time")
    parser.add_argument("--trace", type=Path, help="router logits that --record has written")
    parser.add_argument("--record", type=Path, help="write a trace of --model, and end")
    parser.add_argument("--model", type=Path, help="folder of a model for --record")
    parser.add_argument("--quick", action="store_true", help="small sizes: for CI")
    parser.add_argument("--out", type=Path, help="CSV file (default: results/<date>-...)")
    parser.add_argument("--no-plot", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.ranks, args.tokens, args.repeats = ["tiny"], [2, 4, 8], 128, 2
    if (args.record is None) != (args.model is None):
        parser.error("--record and --model go together")
    if args.trace and len(args.shapes) != 1:
        parser.error("a trace is of one model: name it with --shapes")
    return args


# --- The cost curve ----------------------------------------------------------------------------


class CostCurve:
    """Milliseconds of one expert for a number of assignments: measured points, lines between."""

    def __init__(self, points: dict[int, float]):
        self.at, self.ms = zip(*sorted(points.items()), strict=True)

    def __call__(self, assignments: int) -> float:
        if assignments == 0:
            return 0.0
        place = min(max(bisect.bisect_left(self.at, assignments), 1), len(self.at) - 1)
        (x0, x1), (y0, y1) = self.at[place - 1 : place + 1], self.ms[place - 1 : place + 1]
        return max(y0 + (y1 - y0) * (assignments - x0) / (x1 - x0), 0.0)


def time_experts(shape: Shape, loads: list[int], repeats: int) -> float:
    """Milliseconds of experts of that shape with these loads, on one core: the best call.

    The best, because others use the machine at the same time; the first call compiles.
    """
    import torch

    from vllm_capmoe.experts import fused_experts_prepared, prepare_weights

    layer = make_layer(shape, torch.device("cpu"), torch.bfloat16, experts=len(loads))
    packed = prepare_weights(layer.w13, layer.w2, activation="silu", release=True)
    if packed is None:
        raise RuntimeError("this build of torch can't pack bfloat16 weights (oneDNN)")
    experts = torch.repeat_interleave(torch.arange(len(loads)), torch.tensor(loads))[:, None]
    hidden = torch.randn(len(experts), shape.hidden, dtype=torch.bfloat16)
    weights = torch.ones(len(experts), 1)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        fused_experts_prepared(hidden, packed, weights, experts.int())
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[1:])


def measure_curve(shape: Shape, repeats: int) -> tuple[CostCurve, float]:
    """The curve, and what three experts take over the sum of what it says of them."""
    curve = CostCurve({n: time_experts(shape, [n], repeats) for n in ASSIGNMENTS})
    several = [256, 64, 200]
    ratio = time_experts(shape, several, repeats) / sum(map(curve, several))
    return curve, ratio


# --- Routing -----------------------------------------------------------------------------------


def logits_of(shape: Shape, ranks: int, args: argparse.Namespace) -> list[list[Any]]:
    """Router logits [T, E] of every layer and rank: `logits[layer][rank]`."""
    import torch

    if args.trace:
        trace = torch.load(args.trace, weights_only=True)
        return [list(layer.tensor_split(ranks)) for layer in trace]
    cpu = torch.device("cpu")
    seeds = range(ranks)
    return [
        [router_logits(args.tokens, shape, shape.peak, cpu, torch.float32, seed) for seed in seeds]
    ]


def owners(shape: Shape, ranks: int) -> list[int]:
    """The rank of every expert: vLLM's linear placement, the first ranks with one more."""
    each, more = divmod(shape.experts, ranks)
    return [rank for rank in range(ranks) for _ in range(each + (rank < more))]


def route_all(
    shape: Shape, logits: list[Any], mode: str, gamma: float, level: str
) -> tuple[list[int], float]:
    """Loads of all experts over all ranks' tokens, and the share of dropped assignments."""
    import torch

    from vllm_capmoe.torch_routing import route_torch

    ranks = len(logits)
    owner = torch.tensor(owners(shape, ranks))
    plan = make_plan(
        shape,
        mode,
        gamma,
        level=level,
        expert_device=owner.tolist(),
        has_token_device=True,
    )
    before = after = torch.zeros(shape.experts, dtype=torch.int64)
    kept = 0
    for rank, logits_TE in enumerate(logits):
        selection = route_torch(
            logits_TE.float().softmax(-1),
            plan,
            device_E=owner,
            token_device_T=torch.full((len(logits_TE),), rank),
        )
        before, after = before + selection.load_before, after + selection.load_after
        kept += int(selection.kept)
    return after.tolist(), 1 - kept / int(before.sum())


def project(
    shape: Shape, curve: CostCurve, args: argparse.Namespace
) -> list[dict[str, float | str | int]]:
    """The rows of one model."""
    rows: list[dict[str, float | str | int]] = []
    for ranks in args.ranks:
        if ranks > shape.experts:
            continue
        logits = logits_of(shape, ranks, args)
        owner = owners(shape, ranks)
        baseline = 0.0
        for mode, gamma in [("none", float("inf"))] + [(m, g) for m in MODES for g in GAMMAS]:
            ms = busiest = total = dropped = 0.0
            for layer in logits:
                used = "drop" if mode == "none" else mode
                loads, share = route_all(shape, layer, used, gamma, args.level)
                times, rank_loads = [0.0] * ranks, [0] * ranks
                for expert, load in enumerate(loads):
                    times[owner[expert]] += curve(load)
                    rank_loads[owner[expert]] += load
                ms, dropped = ms + max(times), dropped + share / len(logits)
                busiest, total = busiest + max(rank_loads), total + sum(loads)
            baseline = baseline or ms
            said = (shape.speedup or {}).get(gamma) if ranks == shape.ranks else None
            rows.append(
                {
                    "model": shape.name,
                    "ranks": ranks,
                    "experts_per_rank": f"{shape.experts / ranks:.3g}",
                    "mode": mode,
                    "gamma": gamma,
                    "level": args.level,
                    "dropped": dropped,
                    "rank_load": busiest * ranks / total,
                    "projected_ms": ms / len(logits),
                    "projected_speedup": baseline / ms,
                    "paper_speedup": said[MODES.index(mode)] if said and mode in MODES else "",
                }
            )
    return rows


# --- A trace of a real engine ------------------------------------------------------------------


def keep_logits(worker: Any) -> None:
    """Keep the router logits of all real tokens from now on. Sent there by collective_rpc."""
    from vllm.forward_context import get_forward_context

    from vllm_capmoe.integration.layers import moe_layers

    worker.trace = [[] for _ in moe_layers(worker.vllm_config)]

    def keeping(route: Any, kept: list[Any]) -> Any:
        def keep(router_logits: Any, topk_ids: Any) -> Any:
            padding = get_forward_context().is_padding
            if padding is not None:
                kept.append(router_logits[~padding[: len(router_logits)]].float().cpu())
            return route(router_logits, topk_ids)

        return keep

    for layer, kept in zip(moe_layers(worker.vllm_config), worker.trace, strict=True):
        layer.router.route = keeping(layer.router.route, kept)


def write_trace(worker: Any, path: str) -> int:
    """Write what was kept: a list of [T, E], layer by layer. Returns T."""
    import torch

    trace = [torch.cat(kept) for kept in worker.trace]
    torch.save(trace, path)
    return len(trace[0])


def record(model: Path, path: Path) -> int:
    """Run prompts of plain words through a model and write the logits of its routers."""
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(model),
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=2048,
        additional_config={"moe_capacity": {"mode": "drop", "factor": "inf"}},
    )
    llm.collective_rpc(keep_logits)
    words = Path(__file__).read_text().split()
    prompts = [" ".join(words[start : start + 100]) for start in range(0, len(words) - 100, 50)]
    llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
    (tokens,) = llm.collective_rpc(write_trace, args=(str(path.absolute()),))
    llm.llm_engine.engine_core.shutdown()
    print(f"{path}: router logits of {tokens} tokens")
    return 0


# --- Results -----------------------------------------------------------------------------------


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel per model: projected speed-up over ranks; stars are the paper's figures."""
    pyplot = pyplot_for(path)
    if pyplot is None:
        return

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(4.2 * len(models), 4.2), squeeze=False, sharey=True
    )
    for axis, model in zip(axes[0], models, strict=True):
        for mode, style in zip(MODES, ("-", "--"), strict=True):
            for gamma, color in zip(GAMMAS, ("tab:blue", "tab:orange", "tab:red"), strict=True):
                mine = [
                    r for r in rows if (r["model"], r["mode"], r["gamma"]) == (model, mode, gamma)
                ]
                xs, ys = [r["ranks"] for r in mine], [r["projected_speedup"] for r in mine]
                axis.plot(xs, ys, style, color=color, marker=".", label=f"{mode} {gamma}")
                for r in mine:
                    if r["paper_speedup"] != "":
                        marker = "*" if mode == "drop" else "P"
                        axis.plot(r["ranks"], r["paper_speedup"], marker, color=color, ms=9)
        axis.set(title=model, xlabel="expert parallel ranks")
        axis.set_xscale("log", base=2)
        axis.axhline(1, color="black", linewidth=0.5)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("speed-up of the routed experts, projected")
    axes[0][-1].legend(fontsize=8)
    figure.suptitle("Lines: projected. Stars (drop) and plusses (expanded): the paper, 8 or 6 H20")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(path)


def main() -> int:
    args = parse_args()
    if args.record:
        return record(args.model, args.record)
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    source = f"trace {args.trace.name}" if args.trace else f"{args.tokens} tokens per rank"
    notes = [
        "measured: milliseconds of one expert on one CPU core, bfloat16, best of "
        f"{args.repeats}; see the lines below",
        f"projected: all columns, by the slowest rank's experts; routed: {source}",
    ]
    head = header(None, notes)
    rows = []
    for name in args.shapes:
        shape = TINY if name == "tiny" else SHAPES[name]
        if args.trace:
            shape = replace(shape, experts=torch.load(args.trace, weights_only=True)[0].shape[1])
        curve, ratio = measure_curve(shape, args.repeats)
        points = ", ".join(f"{n}: {ms:.4g}" for n, ms in zip(curve.at, curve.ms, strict=True))
        note = f"measured, {name}: {points}; three experts over the sum of them {ratio:.2f}"
        print(note, flush=True)
        head.append(f"# {note}")
        if not args.quick and abs(ratio - 1) > ADDITIVE:
            print(
                f"gate failed: {name}: experts' times don't add up ({ratio:.2f})", file=sys.stderr
            )
            return 1
        rows += project(shape, curve, args)
    quick = "-quick" * args.quick
    path = args.out or output_folder() / f"{today()}-straggler_project-cpu{quick}.csv"
    write_rows(path, head, COLUMNS, rows)
    if not args.no_plot:
        plot(rows, path.with_suffix(".png"))
    for row in rows:
        if row["paper_speedup"] != "":
            print(
                f"{row['model']:17} {row['ranks']} ranks, {row['mode']:8} {row['gamma']}: "
                f"projected {row['projected_speedup']:.2f}, paper {row['paper_speedup']:.2f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
