"""A real vLLM, end to end: stock, our experts, capacities, on a model of random weights.

    python benchmarks/bench_engine.py --models mixtral-8x7b --layers 8
    python benchmarks/bench_engine.py --models olmoe --contenders stock ours-inf
    python benchmarks/bench_engine.py --quick                   # tiny, on the CPU or a GPU

The model has the dimensions of the real one, but for the number of layers (--layers, so that it
fits the card and the minutes). Its weights are made on the device: random, at the scale of a
trained model, with a router whose largest load is --skew times the mean (`_weights.py`). No
tokenizer: prompts are random token ids. CUDA graphs and compilation are on (--eager: off).

Contenders, each an engine in a process of its own: `stock` is vLLM without plugins; `ours-inf`
our experts and routing without a limit (Token Drop, gamma = inf); `drop-1.5`, `expanded-1.5`
with one; `vllm-drop-1.5` the same under vLLM's own kernels. Loads: `prefill` long prompts and few
tokens out, `decode` the contrary. Each load runs once to warm up, then --repeats times; the median
run counts. TTFT is from arrival, all requests arriving at once, so it holds the time in the queue.

Greedy tokens of some prompts are compared with those of stock: `greedy_equal` requests agree in
all tokens; `worst_margin` is the largest distance (log-probability) between the two best tokens of
stock where a request first differs: differences at tiny margins are rounding.
Loads come from the plugin's counters: sums over layers and steps of the largest load over the mean.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _common as common
import _tables
import _weights as weights

CONTENDERS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "ours-inf": {"mode": "drop", "factor": "inf", "backend": "ours"},
    "drop-1.5": {"mode": "drop", "factor": 1.5, "backend": "ours"},
    "expanded-1.5": {"mode": "expanded", "factor": 1.5, "backend": "ours"},
    "vllm-drop-1.5": {"mode": "drop", "factor": 1.5, "backend": "vllm"},
    "vllm-expanded-1.5": {"mode": "expanded", "factor": 1.5, "backend": "vllm"},
}
LOADS = {"prefill": (64, 2048, 4), "decode": (256, 128, 256)}  # requests, prompt, tokens out
QUICK_LOADS = {"prefill": (3, 24, 2), "decode": (3, 8, 4)}
GREEDY = (8, 64, 16)
KEY = ("model", "layers", "skew", "contender", "load")
COLUMNS = (
    *KEY,
    *("requests", "prompt", "output", "tokens_per_s", "output_per_s", "over_stock"),
    *("ttft_ms", "ttft_p99_ms", "tpot_ms"),
    *("max_over_mean_before", "max_over_mean_after", "dropped_share"),
    *("greedy_equal", "greedy_requests", "worst_margin", "start_s", "error"),
)


def parse_args() -> argparse.Namespace:
    parser = common.parser(__doc__, shapes=False)
    parser.add_argument(
        "--models", nargs="+", choices=list(weights.MODELS), default=["mixtral-8x7b", "olmoe"]
    )
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--skew", type=float, default=2.8, help="largest load over the mean")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=None)
    parser.add_argument("--loads", nargs="+", choices=list(LOADS), default=list(LOADS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="no compilation, no CUDA graphs")
    parser.add_argument("--memory", type=float, default=0.9, help="share of the card's memory")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.models, args.layers, args.repeats, args.eager = ["tiny"], None, 1, True
        args.contenders = args.contenders or ["stock", "drop-1.5"]
    args.contenders = args.contenders or list(CONTENDERS)
    return args


# --- the parent: one process per engine ---------------------------------------------------------


def specification(args: argparse.Namespace, model: str, contender: str, folder: Path) -> Path:
    """What a child runs, as a JSON file in `folder`."""
    loads = QUICK_LOADS if args.quick else LOADS
    spec = {
        "model": model,
        "layers": args.layers or weights.MODELS[model]["num_hidden_layers"],
        "skew": args.skew,
        "capacity": CONTENDERS[contender],
        "loads": {name: loads[name] for name in args.loads},
        "greedy": (2, 8, 3) if args.quick else GREEDY,
        "repeats": args.repeats,
        "eager": args.eager,
        "memory": args.memory,
    }
    path = folder / f"{model}-{contender}.json"
    path.write_text(json.dumps(spec))
    return path


def environment(contender: str) -> dict[str, str]:
    """Of a child: one process for all of the engine, no network, no foreign plugins."""
    more = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "" if CONTENDERS[contender] is None else "capmoe",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        # flashinfer may be absent, and both sides sample alike
        "VLLM_USE_FLASHINFER_SAMPLER": os.environ.get("VLLM_USE_FLASHINFER_SAMPLER", "0"),
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
    }
    return {**os.environ, **more}


def run_child(spec: Path, contender: str, seconds: float) -> dict[str, Any]:
    """The result of one engine; {"error": last words} where it fails, {"late": ...} where the
    time ran out."""
    log, result = spec.with_suffix(".log"), spec.with_suffix(".result.json")
    command = [sys.executable, __file__, "--child", str(spec)]
    limit = None if math.isinf(seconds) else max(seconds, 1.0)
    with log.open("w") as out:
        try:
            subprocess.run(
                command,
                env=environment(contender),
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=True,
            )
        except subprocess.TimeoutExpired:
            return {"late": f"not done in {seconds:.0f} s"}
        except subprocess.CalledProcessError:
            text = log.read_text(errors="replace")
            print(text[-4000:], file=sys.stderr)
            lines = [line for line in text.splitlines() if "Error" in line]
            return {"error": (lines or text.splitlines() or ["no words"])[-1][-300:]}
    return dict(json.loads(result.read_text()))


def compare_greedy(ours: list[Any], stock: list[Any]) -> tuple[int, float]:
    """Requests that agree in all tokens; the largest margin of stock at a first difference."""
    equal, worst = 0, 0.0
    for mine, theirs in zip(ours, stock, strict=True):
        pairs = zip(mine["tokens"], theirs["tokens"], theirs["margins"], strict=True)
        differing = [margin for a, b, margin in pairs if a != b]
        equal += not differing
        worst = max([worst, *differing[:1]])
    return equal, worst


def add_rows(
    table: _tables.Table, shared: dict[str, Any], result: dict[str, Any], stock: list[Any]
) -> None:
    """One row per load; `stock` has the tokens to compare with, or nothing."""
    if "error" in result:
        table.add({**shared, "load": "-", "error": result["error"]})
        return
    for load, figures in result["loads"].items():
        row = {**shared, "load": load, **figures, "start_s": result["start_s"]}
        base = [
            r
            for r in table.rows
            if r["contender"] == "stock"
            and all(r[k] == _tables.text(row[k]) for k in ("model", "layers", "skew", "load"))
        ]
        if base:
            row["over_stock"] = figures["tokens_per_s"] / float(base[0]["tokens_per_s"])
        if stock and shared["contender"] != "stock":
            equal, margin = compare_greedy(result["greedy"], stock)
            row |= {
                "greedy_equal": equal,
                "greedy_requests": len(stock),
                "worst_margin": margin,
            }
        table.add(row)


def goals(rows: list[dict[str, str]]) -> None:
    ours = [r for r in rows if r["contender"] == "ours-inf" and r["over_stock"]]
    speeds = [float(r["over_stock"]) for r in ours]
    text = "ours without a limit over stock, tokens per second, min >= 1.0"
    _tables.verdict(text, min(speeds, default=0.0), lambda v: v >= 1.0, len(speeds))
    margins = [float(r["worst_margin"]) for r in ours if r["worst_margin"]]
    text = "greedy tokens without a limit: largest margin at a difference, max <= 0.1"
    _tables.verdict(text, max(margins, default=0.0), lambda v: v <= 0.1, len(margins))
    for row in rows:
        what = row["error"] or (
            f"{float(row['tokens_per_s']):9.0f} tokens/s, {row['over_stock'] or '-'} of stock, "
            f"TTFT {row['ttft_ms']} ms, {row['tpot_ms']} ms per token, loads "
            f"{row['max_over_mean_before'] or '-'} -> {row['max_over_mean_after'] or '-'}"
        )
        print(f"{row['model']:14} {row['contender']:18} {row['load']:8} {what}")


def main() -> None:
    args = parse_args()
    if args.child:
        child(args.child)
        return
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.out is None:
        name = f"{_tables.today()}-engine-{_tables.device_slug(device)}{'-quick' * args.quick}.csv"
        args.out = _tables.output_folder() / name
    lines = [f"loads (requests, prompt, output) {LOADS}; eager {args.eager}; bfloat16"]
    table = _tables.Table(args.out, COLUMNS, KEY, _tables.header(device, lines))
    deadline = time.monotonic() + args.budget
    failed = False
    # Stock's tokens, beside the CSV: whoever continues a table compares with them.
    tokens_file = args.out.with_suffix(".greedy.json")
    tokens = json.loads(tokens_file.read_text()) if tokens_file.exists() else {}
    starts = [float(row["start_s"]) for row in table.rows if row["start_s"]]
    needed = starts[-1] if starts else 0.0  # seconds that the last engine took to start
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            for contender in args.contenders:
                layers = args.layers or weights.MODELS[model]["num_hidden_layers"]
                shared = dict(zip(KEY, (model, layers, args.skew, contender), strict=False))
                todo = [n for n in args.loads if not table.has({**shared, "load": n})]
                left = deadline - time.monotonic()
                if not todo:
                    continue
                if left <= needed:
                    print(
                        f"{max(left, 0):.0f} s of {args.budget:.0f} s left, and the last engine "
                        f"took {needed:.0f} s to start: run again to go on"
                    )
                    break
                result = run_child(
                    specification(args, model, contender, Path(folder)), contender, left
                )
                if "late" in result:  # no error: the next run measures it
                    print(f"{model} {contender}: {result['late']}", flush=True)
                    break
                failed |= "error" in result
                needed = result.get("start_s", needed)
                same = f"{model} {layers} {args.skew}"
                if contender == "stock" and "error" not in result:
                    tokens[same] = result["greedy"]
                    tokens_file.write_text(json.dumps(tokens))
                add_rows(table, shared, result, tokens.get(same, []))
                print(f"{model} {contender}: {result.get('error', 'done')}", flush=True)
    goals(table.rows)
    sys.exit(failed)


# --- the child: one engine ----------------------------------------------------------------------


def child(spec_path: Path) -> None:
    """Build the engine that the file describes, run its loads, write the result beside it."""
    spec = json.loads(spec_path.read_text())
    started = time.monotonic()
    import torch

    on_gpu = torch.cuda.is_available()
    weights.register_loader()
    capacity = spec["capacity"]
    engine: dict[str, Any] = {}
    if capacity is not None:
        import vllm_capmoe

        vllm_capmoe.register()  # where it is not installed, vLLM finds no entry point
        if capacity["backend"] == "ours":
            capacity["backend"] = "triton" if on_gpu else "torch"
        engine["additional_config"] = {"moe_capacity": capacity}
    if on_gpu:
        engine["gpu_memory_utilization"] = spec["memory"]
    from vllm import LLM

    longest = max(prompt + output for _, prompt, output in spec["loads"].values())
    folder = weights.write_config(spec_path.parent / spec["model"], spec["model"], spec["layers"])
    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format=weights.LOAD_FORMAT,
        model_loader_extra_config={"skew": spec["skew"]},
        dtype="bfloat16",
        seed=0,
        max_model_len=max(longest, 128),
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        enforce_eager=spec["eager"],
        distributed_executor_backend="uni",  # one process, in which the load format is known
        disable_log_stats=False,  # times of each request
        **engine,
    )
    result: dict[str, Any] = {"start_s": time.monotonic() - started, "loads": {}}
    result["greedy"] = greedy(llm, *spec["greedy"])
    for name, sizes in spec["loads"].items():
        runs = [one_run(llm, sizes, capacity is not None) for _ in range(1 + spec["repeats"])]
        runs = sorted(runs[1:], key=lambda run: run["tokens_per_s"])
        result["loads"][name] = runs[len(runs) // 2]
    spec_path.with_suffix(".result.json").write_text(json.dumps(result))


def make_prompts(llm: Any, count: int, length: int, seed: int) -> list[Any]:
    """Random token ids, the same for every contender."""
    import torch

    size = llm.llm_engine.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, size, (count, length), generator=generator)
    return [{"prompt_token_ids": row} for row in ids.tolist()]


def greedy(llm: Any, count: int, length: int, output: int) -> list[dict[str, Any]]:
    """Tokens of some prompts, one request after the other, with the margins of each choice."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=output, ignore_eos=True, logprobs=2, detokenize=False
    )
    found = []
    for prompt in make_prompts(llm, count, length, seed=1):
        completion = llm.generate([prompt], sampling, use_tqdm=False)[0].outputs[0]
        best = [sorted((e.logprob for e in p.values()), reverse=True) for p in completion.logprobs]
        found.append({"tokens": list(completion.token_ids), "margins": [b[0] - b[1] for b in best]})
    return found


def one_run(llm: Any, sizes: tuple[int, int, int], counted: bool) -> dict[str, Any]:
    """One load: all requests at once; rates, times and loads."""
    from vllm import SamplingParams

    count, length, output = sizes
    sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
    prompts = make_prompts(llm, count, length, seed=2)
    before = llm.collective_rpc("moe_capacity_counters")[0] if counted else []
    start = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    after = llm.collective_rpc("moe_capacity_counters")[0] if counted else []
    first, per_token = [], []
    for metrics in (request.metrics for request in outputs):
        first.append(1e3 * metrics.first_token_latency)
        span = metrics.last_token_ts - metrics.first_token_ts
        per_token.append(1e3 * span / max(metrics.num_generation_tokens - 1, 1))
    first.sort()
    figures = {
        "requests": count,
        "prompt": length,
        "output": output,
        "tokens_per_s": count * (length + output) / seconds,
        "output_per_s": count * output / seconds,
        "ttft_ms": statistics.median(first),
        "ttft_p99_ms": first[min(len(first) - 1, math.ceil(0.99 * len(first)))],
        "tpot_ms": statistics.median(per_token),
    }
    return figures | load_figures(before, after)


def load_figures(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, float]:
    """Largest load over the mean, before and after capacity, and the share that was dropped."""
    if not after:
        return {}
    total: dict[str, int] = {"assigned": 0, "held": 0, "dropped": 0, "before": 0, "after": 0}
    experts = len(after[0]["load_before"])
    for old, new in zip(before, after, strict=True):
        total["assigned"] += sum(new["load_before"]) - sum(old["load_before"])
        total["held"] += sum(new["load_after"]) - sum(old["load_after"])
        total["dropped"] += new["dropped"] - old["dropped"]
        total["before"] += new["max_before"] - old["max_before"]
        total["after"] += new["max_after"] - old["max_after"]
    return {
        "max_over_mean_before": total["before"] * experts / max(total["assigned"], 1),
        "max_over_mean_after": total["after"] * experts / max(total["held"], 1),
        "dropped_share": total["dropped"] / max(total["assigned"], 1),
    }


if __name__ == "__main__":
    main()
