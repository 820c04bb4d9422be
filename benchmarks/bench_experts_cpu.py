"""Time of the Mixture-of-Experts computation on the CPU: vLLM's kernel against ours.

    python benchmarks/bench_experts_cpu.py --threads 1 2
    python benchmarks/bench_experts_cpu.py --quick

Order: correctness gate (exit status 1 if it fails), then times, then the CSV. Each thread count is
a process of its own, as OpenMP reads it at the start. Contenders take turns, call by call; several
layers' weights take turns, so that none is in the cache, as in a model. Columns: `stock` is
`apply` of vLLM's CPU experts on their packed weights, `ours` is `fused_experts_prepared`, `plain`
is `fused_experts_torch` on unpacked weights, `first` is `ours` at its first call with a routing
(oneDNN compiles sizes it has not seen). Milliseconds: medians, and the best of each, which is
the steadier figure on a machine that other processes use at the same time.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import _tables

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
GATE_TOKENS = (1, 8, 100)
DROP_TOKENS = (64, 512, 2048)
DROP_SHARES = (0.25, 0.5)
COLUMNS = (
    "threads",
    "tokens",
    "dropped",
    "experts_hit",
    "stock_ms",
    "ours_ms",
    "plain_ms",
    "first_ms",
    "stock_over_ours",
    "stock_best_ms",
    "ours_best_ms",
    "best_stock_over_ours",
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=3584)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4, help="weight sets that take turns")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over the layers")
    parser.add_argument("--quick", action="store_true", help="small sizes, one thread: for CI")
    parser.add_argument("--out", type=Path, help="CSV file (default: results/<date>-...)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.threads, args.tokens = [1], [1, 16, 128]
        args.hidden, args.intermediate, args.layers, args.rounds = 256, 512, 2, 3
    return args


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """Gate and times for the thread count that this process was started with."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor
    from vllm._custom_ops import cpu_prepack_moe_weight
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    from vllm_capmoe.experts import fused_experts_prepared, fused_experts_torch, prepare_weights

    threads = args.threads[0]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    H, I, E, K = args.hidden, args.intermediate, args.experts, args.top_k  # noqa: E741, N806
    classes = (
        cpu_moe.X86CPUUnquantizedExperts,
        cpu_moe.ArmCPUUnquantizedExperts,
        cpu_moe.CPUUnquantizedExperts,
    )
    stock_class = next(c for c in classes if c._supports_current_device())
    # What `apply` reads of its instance; the real one needs a model configuration to build.
    stock_self = SimpleNamespace(
        _use_zentorch=False, isa=stock_class.isa, w1_bias=None, w2_bias=None
    )

    raw, packed, prepared = [], [], []
    for _ in range(args.layers):
        w13 = torch.randn(E, 2 * I, H).mul_(H**-0.5).bfloat16()
        w2 = torch.randn(E, H, I).mul_(I**-0.5).bfloat16()
        raw.append((w13, w2))
        packed.append(tuple(cpu_prepack_moe_weight(w, stock_class.isa) for w in (w13, w2)))
        ours_weights = prepare_weights(w13, w2, activation="silu")
        if ours_weights is None:
            sys.exit("this CPU has no prepacked bfloat16 product: nothing to compare")
        prepared.append(ours_weights)

    def stock(layer: int, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        out = torch.empty_like(x)
        stock_class.apply(
            stock_self,
            out,
            x,
            *packed[layer],
            weights,
            experts,
            MoEActivation.SILU,
            E,
            None,
            None,
            None,
            None,
            None,
            None,
            False,
        )
        return out

    def ours(layer: int, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return fused_experts_prepared(x, prepared[layer], weights, experts)

    def plain(layer: int, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        w13, w2 = raw[layer]
        return fused_experts_torch(x, w13, w2, weights, experts, activation="silu")

    def loop(layer: int, x: Tensor, weights: Tensor, experts: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.float32)
        for e in range(E):
            token, place = (experts == e).nonzero(as_tuple=True)
            w13, w2 = (w[e].to(dtype) for w in raw[layer])
            gate, up = F.linear(x[token].to(dtype), w13).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, w2).float()
            out.index_add_(0, token, y * weights[token, place, None])
        return out.to(dtype).float()

    def inputs(tokens: int, dropped: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(tokens, H).bfloat16()
        weights, experts = torch.randn(tokens, E).softmax(-1).topk(K)
        experts = experts.int()
        slots = torch.randperm(tokens * K)[: round(dropped * tokens * K)]
        experts.view(-1)[slots] = -1
        return x, weights.contiguous(), experts.contiguous()

    for tokens in GATE_TOKENS:
        for dropped in (0.0, 0.25):
            case = inputs(tokens, dropped)
            exact = loop(0, *case, torch.float32)
            allowed = 2 * float((loop(0, *case, torch.bfloat16) - exact).abs().max())
            for f in (ours, plain) if dropped else (stock, ours, plain):
                error = float((f(0, *case).float() - exact).abs().max())
                if not error <= allowed:
                    sys.exit(
                        f"gate: {f.__name__} at {tokens} tokens, {dropped:.0%} dropped, is "
                        f"off by {error:.3g}, at most {allowed:.3g} allowed"
                    )
    print(f"gate passed; threads {threads}, stock kernel {stock_class.__name__}", flush=True)

    print(" ".join(f"{c[:15]:>15}" for c in COLUMNS))
    rows = []
    grid = [(t, 0.0) for t in args.tokens]
    grid += [(t, d) for t in DROP_TOKENS if t in args.tokens for d in DROP_SHARES]
    for tokens, dropped in grid:
        # vLLM's kernel indexes with the id, so -1 is not for it.
        contenders = [ours, plain] if dropped else [stock, ours, plain]
        cases = [inputs(tokens, dropped) for _ in range(args.layers)]
        times: dict[str, list[float]] = {f.__name__: [] for f in contenders}
        first = []
        for r in range(1 + (args.rounds if tokens < 512 else max(2, args.rounds // 2))):
            for layer, case in enumerate(cases):
                for f in contenders:
                    start = time.perf_counter()
                    f(layer, *case)
                    elapsed = 1e3 * (time.perf_counter() - start)
                    if r:
                        times[f.__name__].append(elapsed)
                    elif f is ours:
                        first.append(elapsed)
        median = {name: statistics.median(values) for name, values in times.items()}
        best = {name: min(values) for name, values in times.items()}
        hit = statistics.mean(int((c[2].unique() >= 0).sum()) for c in cases)
        rows.append(
            dict(
                zip(
                    COLUMNS,
                    (
                        threads,
                        tokens,
                        dropped,
                        f"{hit:.1f}",
                        f"{median['stock']:.3f}" if "stock" in median else "",
                        f"{median['ours']:.3f}",
                        f"{median['plain']:.3f}",
                        f"{statistics.median(first):.3f}",
                        f"{median['stock'] / median['ours']:.2f}" if "stock" in median else "",
                        f"{best['stock']:.3f}" if "stock" in best else "",
                        f"{best['ours']:.3f}",
                        f"{best['stock'] / best['ours']:.2f}" if "stock" in best else "",
                    ),
                    strict=True,
                )
            )
        )
        print(" ".join(f"{v!s:>15}" for v in rows[-1].values()), flush=True)
    return rows


def main() -> None:
    args = parse_args()
    if args.child:
        rows = measure(args)
        with args.child.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writerows(rows)
        return
    quick = "-quick" * args.quick
    out = args.out or _tables.output_folder() / f"{_tables.today()}-experts_cpu{quick}.csv"
    head = _tables.header(None)  # before the first time, so that the revision is what runs
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for threads in args.threads:
            part = Path(folder) / f"{threads}.csv"
            command = [sys.executable, __file__, "--child", str(part), "--threads", str(threads)]
            for name in ("hidden", "intermediate", "experts", "top_k", "layers", "rounds"):
                command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
            command += ["--tokens", *map(str, args.tokens)]
            env = os.environ | {"OMP_NUM_THREADS": str(threads)}
            status = subprocess.run(command, env=env, check=False).returncode
            if status:
                sys.exit(status)
            parts.append(part.read_text())
    head.append(
        f"# threads {' '.join(map(str, args.threads))}, hidden {args.hidden}, intermediate "
        f"{args.intermediate}, experts {args.experts}, top-{args.top_k}, bfloat16, silu, "
        f"{args.layers} layers in turn, {args.rounds} rounds (half from 512 tokens); load average "
        f"at the end {os.getloadavg()[0]:.1f} (this benchmark included)"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join([*head, ",".join(COLUMNS), ""]) + "".join(parts))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
