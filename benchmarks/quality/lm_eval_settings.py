"""lm-evaluation-harness under a list of the plugin's settings: one table with paired differences.

    pip install lm-eval          # beside vLLM and this plugin
    python benchmarks/quality/lm_eval_settings.py MODEL --tasks arc_challenge,gsm8k \\
        --settings '{"mode": "off"}' '{"mode": "drop", "factor": 1.5}' --out table.md \\
        [--engine '{"tensor_parallel_size": 8, "enable_expert_parallel": true}'] [--limit 200]

Nine tasks in common use are, by lm_eval's names, arc_challenge, boolq, gsm8k, hellaswag, mmlu,
openbookqa, piqa, rte and winogrande; --include-path names a folder of your own. Every setting runs
in a process of its own: `lm_eval --model vllm` with the setting in `additional_config`. The first
one is what the others are compared with, document by document: difference of the mean, its standard
error, and flips (documents with another score).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Task -> (document, filter) -> score.
Scores = dict[str, dict[tuple[str, str], float]]


def run_one(model: str, setting: dict[str, Any], args: argparse.Namespace) -> Scores:
    """The scores of every document under one setting, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "scores.json"
        asked = json.dumps({"setting": setting, "out": str(result)})
        subprocess.run([sys.executable, __file__, *args.command, "--one", asked], check=True)
        found = json.loads(result.read_text())
    return {task: {(doc, kind): s for doc, kind, s in rows} for task, rows in found.items()}


def evaluate(model: str, setting: dict[str, Any], args: argparse.Namespace) -> dict[str, list[Any]]:
    """Task -> [document, filter, score] by lm-evaluation-harness, in this process.

    The score is the first of the task's metrics that its documents have, normalised accuracy first.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    engine = {"max_model_len": 4096, "enable_prefix_caching": False, **args.engine}
    engine["additional_config"] = {**engine.get("additional_config", {}), "moe_capacity": setting}
    found = lm_eval.simple_evaluate(
        model="vllm",
        model_args={"pretrained": model, **engine},
        tasks=args.tasks.split(","),
        limit=args.limit,
        batch_size="auto",
        log_samples=True,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=args.include_path),
    )
    scores: dict[str, list[Any]] = {}
    for task, samples in found["samples"].items():
        metric = next(m for m in ("acc_norm", "acc", "exact_match") if m in samples[0])
        scores[task] = [[str(s["doc_id"]), s["filter"], float(s[metric])] for s in samples]
    return scores


def compare(ours: dict[Any, float], base: dict[Any, float]) -> str:
    """A cell of the table: mean, difference from `base` (standard error), share of flips."""
    mean = statistics.fmean(ours.values())
    if ours is base:
        return f"{mean:.3f}"
    deltas = [ours[key] - base[key] for key in base]
    error = statistics.stdev(deltas) / math.sqrt(len(deltas)) if len(deltas) > 1 else math.nan
    flips = sum(delta != 0 for delta in deltas) / len(deltas)
    return f"{mean:.3f}, {statistics.fmean(deltas):+.3f} ({error:.3f}), {flips:.1%} flips"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("--tasks", required=True, help="names of lm_eval, with commas between")
    parser.add_argument("--settings", nargs="+", type=json.loads, default=[{"mode": "off"}])
    parser.add_argument("--engine", type=json.loads, default={}, help="keywords of vLLM's LLM")
    parser.add_argument("--limit", type=int, help="documents per task")
    parser.add_argument("--include-path", help="folder with tasks of your own")
    parser.add_argument("--out", type=Path, help="the table, Markdown")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.command = sys.argv[1:]
    if args.one:
        scores = evaluate(args.model, args.one["setting"], args)
        Path(args.one["out"]).write_text(json.dumps(scores))
        return 0
    every = [run_one(args.model, setting, args) for setting in args.settings]
    base = every[0]
    lines = ["| setting | " + " | ".join(base) + " |", "|---" * (len(base) + 1) + "|"]
    for setting, found in zip(args.settings, every, strict=True):
        cells = [compare(found[task], base[task]) for task in base]
        lines.append(f"| `{json.dumps(setting)}` | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
