"""Decode keep through a real engine: what fewer experts per step are worth, by k0 and requests.

    python benchmarks/bench_decode.py                     # 6 layers, 64 experts of 512, top-8
    python benchmarks/bench_decode.py --model olmoe       # on a GPU: the dimensions of OLMoE
    python benchmarks/bench_decode.py --quick             # tiny, on the CPU or a GPU

Random weights (`_weights.py`); the experts of the default model are 1.2 GB, so no cache holds them.
Contenders: `stock` is vLLM without plugins, `off` with the plugin and nothing asked for, `auto`
and `k0=N` decode keep without a mode, under vLLM's own kernels. `k0=k` keeps all: what our routing
costs. Three engines, each in a process of its own, take turns at every load: they live side by
side, and only one works. k0 changes between turns in the engine's device table, CUDA graphs or not.

A turn is one `generate` of all requests at once, few prompt tokens and many out. With --drafts N
the engines speculate by n-grams, on prompts that repeat. `output_per_s` and `tpot_ms` (time per
output token of a request) are medians over the turns; `over_stock` and `over_off` are medians of
the ratios within a turn. Active experts are counted in a run of their own, over layers and steps of
decode tokens only (eager engines; under CUDA graphs nothing can be recorded).
"""

from __future__ import annotations

import argparse
import json
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

ENGINES = {"stock": None, "off": {}, "keep": {"decode_keep": "auto"}}
KEY = ("model", "layers", "drafts", "requests", "contender")
COLUMNS = (
    *KEY,
    *("turns", "output", "output_per_s", "tpot_ms", "over_stock", "over_off", "over_off_least"),
    *("active_before", "active_after", "tokens_per_step"),
)
MARK = "bench_decode: "


def parse_args() -> argparse.Namespace:
    parser = common.parser(__doc__, shapes=False)
    parser.add_argument("--model", choices=list(weights.MODELS), default="fine")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--keeps", nargs="+", help="k0, or auto; default: auto and 1 to k")
    parser.add_argument("--drafts", nargs="+", type=int, default=[0, 4], help="0: no speculation")
    parser.add_argument("--output", type=int, default=48, help="tokens of each request")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="compilation and CUDA graphs")
    parser.add_argument("--memory", type=float, default=0.28, help="of the card, for one engine")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.model, args.requests, args.output, args.turns = "tiny-fine", [2, 3], 6, 1
        args.drafts, args.keeps = [2], args.keeps or ["auto", "1"]
    args.layers = args.layers or weights.MODELS[args.model]["num_hidden_layers"]
    k = weights.MODELS[args.model]["num_experts_per_tok"]
    args.keeps = args.keeps or ["auto", *map(str, range(1, k + 1))]
    return args


# --- the parent: engines that take turns --------------------------------------------------------


class Engine:
    """A child process with one engine; `ask` is one turn."""

    def __init__(self, name: str, spec: dict[str, Any]):
        environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_PLUGINS": "" if ENGINES[name] is None else "capmoe",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
            "VLLM_USE_FLASHINFER_SAMPLER": os.environ.get("VLLM_USE_FLASHINFER_SAMPLER", "0"),
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child", json.dumps(spec)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        sys.exit(f"an engine ended with status {self.process.wait()}")

    def ask(self, **task: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=120)


def contenders(keeps: list[str]) -> list[tuple[str, str, str | None]]:
    """Name, engine, k0."""
    kept = [("auto" if keep == "auto" else f"k0={keep}", "keep", keep) for keep in keeps]
    return [("stock", "stock", None), ("off", "off", None), *kept]


def measure(
    table: _tables.Table,
    engines: dict[str, Engine],
    shared: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """All contenders at one number of requests, in turns."""
    todo = contenders(args.keeps)
    if all(table.has({**shared, "contender": name}) for name, _, _ in todo):
        return
    task = {"requests": shared["requests"], "output": args.output}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name, _, _ in todo}
    for turn in range(1 + args.turns):  # the first warms up
        for name, engine, keep in todo if turn % 2 else reversed(todo):
            found = engines[engine].ask(**task, keep=keep, count=False)
            if turn:
                turns[name].append(found)
    for name, engine, keep in todo:
        row = {**shared, "contender": name, "turns": args.turns, "output": args.output}
        for figure in ("output_per_s", "tpot_ms"):
            row[figure] = statistics.median(turn[figure] for turn in turns[name])
        for base in ("stock", "off"):
            ratios = [
                ours["output_per_s"] / theirs["output_per_s"]
                for ours, theirs in zip(turns[name], turns[base], strict=True)
            ]
            row[f"over_{base}"] = statistics.median(ratios)
            row["over_off_least"] = min(ratios)
        if engine == "keep" and not args.compiled:
            row |= engines[engine].ask(**task, keep=keep, count=True)
        table.add(row)
        print(*(f"{column}={_tables.text(row.get(column))}" for column in COLUMNS[2:]), flush=True)


def plot(table: _tables.Table) -> None:
    for drafts in sorted({row["drafts"] for row in table.rows}):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in table.rows:
            if row["drafts"] == drafts and row["contender"] != "stock":
                point = float(row["requests"]), float(row["over_stock"])
                lines.setdefault(row["contender"], []).append(point)
        extra = f"-drafts{drafts}" if drafts != "0" else ""
        _tables.plot_lines(
            table.path.with_name(f"{table.path.stem}{extra}.png"),
            f"Decode keep, {drafts} drafts: output tokens per second over stock vLLM",
            ("requests", "over stock"),
            lines,
            level=1.0,
        )


def main() -> None:
    args = parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    import torch

    device = torch.device("cuda") if torch.cuda.is_available() else None
    if args.out is None:
        slug = "cpu" if device is None else _tables.device_slug(device)
        name = f"{_tables.today()}-decode-{slug}{'-quick' * args.quick}.csv"
        args.out = _tables.output_folder() / name
    lines = [f"bfloat16, {'compiled' if args.compiled else 'eager'}, one process per engine"]
    table = _tables.Table(args.out, COLUMNS, KEY, _tables.header(device, lines))
    deadline = time.monotonic() + args.budget
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(weights.write_config(Path(temporary) / "model", args.model, args.layers))
        for drafts in args.drafts:
            spec = {name: getattr(args, name) for name in ("model", "layers", "compiled", "memory")}
            spec |= {"folder": folder, "drafts": drafts, "output": args.output}
            spec["requests"] = max(args.requests)
            engines = {
                name: Engine(name, {**spec, "capacity": capacity})
                for name, capacity in ENGINES.items()
            }
            for engine in engines.values():
                engine.answer()  # it is ready
            for requests in args.requests:
                if time.monotonic() < deadline:
                    shared = dict(
                        zip(KEY, (args.model, args.layers, drafts, requests), strict=False)
                    )
                    measure(table, engines, shared, args)
            for engine in engines.values():
                engine.close()
    if not args.no_plot:
        plot(table)


# --- the child: one engine ----------------------------------------------------------------------


def child(spec: dict[str, Any]) -> None:
    """Build the engine, then answer one task a line."""
    import torch

    weights.register_loader()
    more: dict[str, Any] = {}
    if spec["capacity"] is not None:
        import vllm_capmoe

        vllm_capmoe.register()  # where it is not installed, vLLM finds no entry point
        more["additional_config"] = {"moe_capacity": spec["capacity"]}
    if spec["drafts"]:
        more["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": spec["drafts"],
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        }
    if torch.cuda.is_available():
        more["gpu_memory_utilization"] = spec["memory"]
    from vllm import LLM

    llm = LLM(
        model=spec["folder"],
        skip_tokenizer_init=True,
        load_format=weights.LOAD_FORMAT,
        model_loader_extra_config={"skew": 1.5},
        dtype="bfloat16",
        seed=0,
        max_model_len=2 * PROMPT + spec["output"],
        max_num_seqs=max(spec["requests"], 2),
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        enforce_eager=not spec["compiled"],
        distributed_executor_backend="uni",  # one process, in which the load format is known
        disable_log_stats=False,  # times of each request
        **more,
    )
    print(MARK + "null", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        if task["keep"] is not None:
            keep = "auto" if task["keep"] == "auto" else int(task["keep"])
            llm.collective_rpc("moe_capacity_change", args=({"decode_keep": keep},))
        print(MARK + json.dumps(one_turn(llm, spec, task)), flush=True)


PROMPT = 32


def one_turn(llm: Any, spec: dict[str, Any], task: dict[str, Any]) -> dict[str, float]:
    """All requests at once: rates and times, or with `count` the experts of the decode steps."""
    import torch
    from vllm import SamplingParams

    size = llm.llm_engine.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(task["requests"])
    # Prompts that repeat, and answers of their tokens, so that n-grams are found.
    ids = torch.randint(3, size, (task["requests"], PROMPT // 4), generator=generator).repeat(1, 4)
    prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=task["output"],
            ignore_eos=True,
            detokenize=False,
            allowed_token_ids=sorted(set(row)),
        )
        for row in ids.tolist()
    ]
    if task["count"]:
        llm.collective_rpc("moe_capacity_record", args=(True,))
    start = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    if task["count"]:
        records = llm.collective_rpc("moe_capacity_records")[0]
        llm.collective_rpc("moe_capacity_record", args=(False,))
        return active(records)
    per_token = []
    for metrics in (request.metrics for request in outputs):
        span = metrics.last_token_ts - metrics.first_token_ts
        per_token.append(1e3 * span / max(metrics.num_generation_tokens - 1, 1))
    return {
        "output_per_s": task["requests"] * task["output"] / seconds,
        "tpot_ms": statistics.median(per_token),
    }


def active(records: list[dict[str, Any]]) -> dict[str, float]:
    """Experts with tokens, mean over layers and steps of decode tokens only; tokens of a step."""
    before, after, tokens = [], [], []
    for step in records:
        real = [row for row, padding in enumerate(step["is_padding"]) if not padding]
        if real and all(step["is_decode"][row] for row in real):
            before.append(sum(load > 0 for load in step["load_before"]))
            after.append(sum(load > 0 for load in step["load_after"]))
            tokens.append(len(real))
    means = map(statistics.fmean, (before, after, tokens))
    return dict(zip(("active_before", "active_after", "tokens_per_step"), means, strict=True))


if __name__ == "__main__":
    main()
