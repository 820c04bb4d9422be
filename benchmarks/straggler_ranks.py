"""The straggler effect on real ranks: what a limit gains where experts live on two processes.

    python benchmarks/straggler_ranks.py [--factor 1.6 --tokens 2048 --rounds 7]
    python benchmarks/straggler_ranks.py --quick

A real vLLM with two workers, one core each, tensor parallel attention and expert parallel MoE on
the CPU: rank 0 computes the first half of the experts, rank 1 the second, and the sum over both
ends the layer, so that every layer waits for the busier rank. The router is skewed so that rank 0
has `--factor` times the mean load. Prompts only: each step is one batch of `--tokens` tokens.

The baseline is gamma = inf: plain top-k with this project's experts, since vLLM's own can't do
expert parallelism on the CPU. One engine runs everything: the plan of its routers is changed
between steps, so that baseline and limits take turns on the same machine, round by round.

Order: a round that records the routing, with gates (all ranks decide alike; without a limit
nothing is dropped; with one no load passes it); then timed rounds; CSV; plot. Columns:

    factor      largest rank load over the mean rank load, over all layers
    ideal       largest rank loads of the baseline over those with the limit
    moe_ms      time in the MoE layers of one step (routing, experts, waiting, sum over ranks): per
                layer the slower rank, added up; median of the rounds
    gain        the baseline's moe_ms over this one: median over the rounds of the round's quotient
    of_ideal    gain / ideal
    step_ms     the whole step in a worker, and step_gain as gain is
    amdahl      what `ideal` leaves for the whole step, if only the MoE layers get faster
    tokens_s    prompt tokens per second, as the caller of LLM.generate sees them
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
LAYERS, EXPERTS, TOP_K = 2, 8, 2
GOAL = 0.85  # of the ideal, for the time in the MoE layers
BASELINE: dict[str, Any] = {"mode": "expanded", "factor": "inf"}
LIMITS: list[dict[str, Any]] = [
    {"mode": mode, "factor": gamma, "level": level}
    for level in ("expert", "device")
    for mode in ("drop", "expanded")
    for gamma in (2.0, 1.5, 1.0)
]
COLUMNS = (
    *("mode", "gamma", "level", "factor", "dropped", "expanded", "ideal"),
    *("moe_ms", "gain", "of_ideal", "step_ms", "step_gain", "amdahl", "tokens_s"),
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--factor", type=float, default=1.6, help="largest rank load over mean")
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=3584)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small sizes: for CI")
    parser.add_argument("--out", type=Path, help="CSV file (default: results/<date>-...)")
    parser.add_argument("--no-plot", action="store_true")
    args = parser.parse_args()
    if not 1 <= args.factor < RANKS:
        parser.error(f"--factor is {args.factor}, but it must be from 1 to less than {RANKS}")
    if args.quick:
        args.tokens, args.hidden, args.intermediate, args.rounds = 256, 256, 512, 2
    return args


# --- The model ---------------------------------------------------------------------------------


def bias_for(factor: float) -> list[float]:
    """Constant router logits [E], in standard deviations, for a rank load of `factor` the mean.

    Falling from the first expert to the last, so that rank 0 has the popular ones; the width is
    found by bisection on random logits of deviation 1.
    """
    import torch

    noise = torch.randn(16384, EXPERTS, generator=torch.Generator().manual_seed(0))
    shape = torch.linspace(0.5, -0.5, EXPERTS)
    low, high = 0.0, 16.0
    for _ in range(30):
        middle = (low + high) / 2
        ids = (noise + middle * shape).topk(TOP_K).indices
        share = float((ids < EXPERTS // RANKS).double().mean())
        low, high = (middle, high) if share * RANKS < factor else (low, middle)
    return (high * shape).tolist()


def make_model(folder: Path, args: argparse.Namespace) -> Path:
    """The example model, of the wanted size and with the wanted bias."""
    import torch

    sys.path.insert(0, str(ROOT / "examples"))
    import make_mixtral

    bias = torch.tensor(bias_for(args.factor))
    make_mixtral.router_bias_E = lambda *_: bias
    return make_mixtral.make_checkpoint(
        folder / "skewed",
        layers=LAYERS,
        hidden=args.hidden,
        intermediate=args.intermediate,
        experts=EXPERTS,
        top_k=TOP_K,
        kv_heads=2,
    )


# --- In the workers (sent there by collective_rpc) ---------------------------------------------


def watch(worker: Any) -> None:
    """Time every MoE layer and every step of this worker from now on, in seconds."""
    import time

    from vllm_capmoe.integration.layers import moe_layers

    worker.times = {"moe": [], "step": []}

    def timed(function: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            times.append(time.perf_counter() - start)
            return result

        return wrapper

    for layer in moe_layers(worker.vllm_config):
        layer.forward = timed(layer.forward, worker.times["moe"])
    worker.execute_model = timed(worker.execute_model, worker.times["step"])


def take_times(worker: Any) -> dict[str, list[float]]:
    """What `watch` has measured since the last call."""
    taken = {name: list(times) for name, times in worker.times.items()}
    for times in worker.times.values():
        times.clear()
    return taken


def set_capacity(worker: Any, settings: dict[str, Any]) -> None:
    """Let the routers follow other settings, as if the engine had been started with them."""
    from vllm_capmoe import CapacityConfig
    from vllm_capmoe.integration.layers import moe_layers
    from vllm_capmoe.integration.placement import placement
    from vllm_capmoe.plan import resolve

    config = CapacityConfig(**settings)
    for layer in moe_layers(worker.vllm_config):
        router = layer.router
        placed = placement(config, layer, router.num_logical_experts)
        router.plan = resolve(
            config,
            num_experts=router.num_logical_experts,
            top_k=router.top_k,
            expert_device=placed.expert_device,
            has_token_device=placed.own_device is not None,
            renormalize=router.renormalize,
        )


# --- Measuring ---------------------------------------------------------------------------------


class GateError(Exception):
    """The engine doesn't do what is being measured."""


def rank_load(load_E: list[int]) -> int:
    """The larger of the two ranks' loads."""
    half = EXPERTS // RANKS
    return max(sum(load_E[:half]), sum(load_E[half:]))


class Bench:
    """The engine, and one batch of prompts that it runs again and again."""

    def __init__(self, model: Path, args: argparse.Namespace):
        import torch

        import vllm_capmoe

        vllm_capmoe.register()
        from vllm import LLM, SamplingParams

        self.llm = LLM(
            model=str(model),
            tensor_parallel_size=RANKS,
            enable_expert_parallel=True,
            distributed_executor_backend="mp",
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=1024,
            max_num_batched_tokens=max(args.tokens, 1024),
            additional_config={"moe_capacity": BASELINE},
        )
        self.llm.collective_rpc(watch)
        self.sampling = SamplingParams(temperature=0, max_tokens=1)
        self.tokens = args.tokens
        length = min(512, args.tokens)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, 30000, (args.tokens // length, length), generator=generator)
        self.prompts = [{"prompt_token_ids": row} for row in ids.tolist()]

    def close(self) -> None:
        """End the workers."""
        self.llm.llm_engine.engine_core.shutdown()

    def step(self, settings: dict[str, Any]) -> dict[str, float]:
        """Run the batch once; milliseconds of its MoE layers and of its step, tokens per second."""
        self.llm.collective_rpc(set_capacity, args=(settings,))
        self.llm.collective_rpc(take_times)
        start = time.perf_counter()
        self.llm.generate(self.prompts, self.sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        ranks = self.llm.collective_rpc(take_times)
        if any(len(rank["step"]) != 1 or len(rank["moe"]) != LAYERS for rank in ranks):
            raise GateError(f"the batch was not one step: {ranks}")
        moe = sum(map(max, zip(*(rank["moe"] for rank in ranks), strict=True)))
        step = max(rank["step"][0] for rank in ranks)
        return {"moe_ms": 1e3 * moe, "step_ms": 1e3 * step, "tokens_s": self.tokens / seconds}

    def loads(self, settings: dict[str, Any]) -> dict[str, float]:
        """The routing of the batch: largest rank loads and shares, after the gates."""
        self.llm.collective_rpc("moe_capacity_record", args=(True, True))
        self.step(settings)
        records, *others = self.llm.collective_rpc("moe_capacity_records")
        self.llm.collective_rpc("moe_capacity_record", args=(False,))
        for other in others:
            if [r["digest"] for r in other] != [r["digest"] for r in records]:
                raise GateError(f"{settings}: the ranks don't decide alike")
        peak = total = topk = dropped = held = 0
        for record in records:
            before, after = record["load_before"], record["load_after"]
            if settings["factor"] == "inf" and before != after:
                raise GateError("the baseline drops something")
            limits = record["capacity"][0]
            bins = after
            if len(limits) > 1:
                half = EXPERTS // RANKS
                bins = [sum(after[:half]), sum(after[half:])]
            if any(load > limit for load, limit in zip(bins, limits * len(bins), strict=False)):
                raise GateError(f"{settings}: loads {bins} pass the limits {limits}")
            kept = sum(
                len({e for e in row if e >= 0} & set(chosen))
                for row, chosen in zip(record["experts"], record["topk"], strict=True)
            )
            peak, total = peak + rank_load(after), total + sum(after)
            topk, dropped, held = topk + sum(before), dropped + sum(before) - kept, held + kept
        return {
            "peak": peak,
            "factor": RANKS * peak / total,
            "dropped": dropped / topk,
            "expanded": (total - held) / topk,
        }


def measure(bench: Bench, rounds: int) -> list[dict[str, Any]]:
    """All rows: first the routing of each setting, then the times, in turns."""
    settings = [BASELINE, *LIMITS]
    loads = [bench.loads(each) for each in settings]
    for each in settings:  # a second warm-up, without recording
        bench.step(each)
    times: list[list[dict[str, float]]] = [[] for _ in settings]
    for number in range(rounds):
        for each, taken in zip(settings, times, strict=True):
            taken.append(bench.step(each))
        print(f"round {number + 1}/{rounds}: load average {os.getloadavg()[0]:.1f}", flush=True)
    share = statistics.median(t["moe_ms"] / t["step_ms"] for t in times[0])
    rows = []
    for each, load, taken in zip(settings, loads, times, strict=True):
        pairs = list(zip(times[0], taken, strict=True))
        ideal = loads[0]["peak"] / load["peak"]
        gain = statistics.median(one["moe_ms"] / other["moe_ms"] for one, other in pairs)
        rows.append(
            {
                "mode": "none" if each is BASELINE else each["mode"],
                "gamma": each["factor"],
                "level": each.get("level", ""),
                **{name: load[name] for name in ("factor", "dropped", "expanded")},
                "ideal": ideal,
                "gain": gain,
                "of_ideal": gain / ideal,
                "step_gain": statistics.median(a["step_ms"] / b["step_ms"] for a, b in pairs),
                "amdahl": 1 / (1 - share + share / ideal),
                **{
                    name: statistics.median(t[name] for t in taken)
                    for name in ("moe_ms", "step_ms", "tokens_s")
                },
            }
        )
    return rows


# --- Results -----------------------------------------------------------------------------------


def write(
    rows: list[dict[str, Any]], head: list[str], args: argparse.Namespace, path: Path
) -> None:
    about = (
        f"{RANKS} ranks, one core each; {LAYERS} layers, hidden {args.hidden}, intermediate "
        f"{args.intermediate}, {EXPERTS} experts, top-{TOP_K}, bfloat16; {args.tokens} prompt "
        f"tokens a step; {args.rounds} rounds; wanted factor {args.factor}; load average at the "
        f"end {os.getloadavg()[0]:.1f} (this benchmark included)"
    )
    from _tables import write_rows

    write_rows(path, [*head, f"# {about}"], COLUMNS, rows)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars: gain in the MoE layers and of the whole step, with the ideal as a mark."""
    from _tables import pyplot_for

    pyplot = pyplot_for(path)
    if pyplot is None:
        return

    shown = rows[1:]
    figure, axis = pyplot.subplots(figsize=(10, 4.5))
    places = range(len(shown))
    axis.bar([p - 0.2 for p in places], [r["gain"] for r in shown], 0.4, label="MoE layers")
    axis.bar([p + 0.2 for p in places], [r["step_gain"] for r in shown], 0.4, label="whole step")
    for p, row in zip(places, shown, strict=True):
        axis.hlines(row["ideal"], p - 0.4, p, color="black", label="ideal" if p == 0 else "")
        axis.hlines(row["amdahl"], p, p + 0.4, color="grey", label="Amdahl" if p == 0 else "")
    labels = [f"{r['mode']}\n{r['gamma']}\n{r['level']}" for r in shown]
    axis.set_xticks(list(places), labels, fontsize=8)
    axis.axhline(1, color="black", linewidth=0.5)
    axis.set_ylabel("times the speed without a limit")
    axis.set_title(f"Two expert parallel ranks, rank load {rows[0]['factor']:.2f} times the mean")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(path)


def main() -> int:
    args = parse_args()
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler in this process: exact batches
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to send functions of this file to the workers
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, sorted(os.sched_getaffinity(0))[:2])),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }.items():
        os.environ.setdefault(name, value)
    from _tables import header, output_folder, today

    head = header(None)  # before the first time, so that the revision is what runs
    quick = "-quick" * args.quick
    path = args.out or output_folder() / f"{today()}-straggler_ranks-cpu{quick}.csv"
    with tempfile.TemporaryDirectory(prefix="capmoe-straggler-") as folder:
        try:
            bench = Bench(make_model(Path(folder), args), args)
            try:
                rows = measure(bench, args.rounds)
            finally:
                bench.close()
        except GateError as error:
            print(f"gate failed: {error}", file=sys.stderr)
            return 1
    write(rows, head, args, path)
    for row in rows:
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{v}" for k, v in row.items()))
    if not args.no_plot:
        plot(rows, path.with_suffix(".png"))
    worst = min(row["of_ideal"] for row in rows[1:])
    print(f"{'PASS' if worst >= GOAL else 'FAIL'} gain / ideal >= {GOAL}: at least {worst:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
