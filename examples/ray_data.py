"""Batch inference with Ray Data, with a capacity limit on the experts.

    python examples/ray_data.py MODEL [--ranks 2] [--mode expanded] [--factor 1.5] [--prompts 32]

`engine_kwargs` of Ray Data's vLLM processor are vLLM's engine arguments, made where the plugin has
not been loaded yet, so the settings go in by `additional_config`, not as `moe_capacity_*` keywords.
The experts are split over `--ranks` GPUs. With RAY_ADDRESS set it runs on that cluster, else on one
that it starts on this machine. Prints the answers and ends with exit status 0.
"""

from __future__ import annotations

import argparse
from typing import Any

SENTENCES = (
    "Once upon a time there was a small village at the edge of a deep forest, where",
    "The train leaves at half past seven from platform nine, so",
    "To bake bread you need flour, water, salt and a warm oven;",
    "Load balancing in a mixture of experts decides how long",
)


def engine_kwargs(ranks: int, mode: str, factor: float | str) -> dict[str, Any]:
    """vLLM's engine arguments: the experts on `ranks` GPUs, with a limit."""
    return {
        "tensor_parallel_size": ranks,
        "enable_expert_parallel": True,
        "max_model_len": 512,
        "enforce_eager": True,
        "additional_config": {"moe_capacity": {"mode": mode, "factor": factor}},
        # A node without vllm-capmoe would take no notice of it, and serve without a limit.
        "worker_extension_cls": "vllm_capmoe.Required",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mode", default="expanded")
    parser.add_argument("--factor", default="1.5", help="a number or inf")
    parser.add_argument("--prompts", type=int, default=32)
    args = parser.parse_args()
    factor = args.factor if args.factor == "inf" else float(args.factor)

    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    config = vLLMEngineProcessorConfig(
        model_source=args.model,
        engine_kwargs=engine_kwargs(args.ranks, args.mode, factor),
        batch_size=16,
        concurrency=1,
        chat_template_stage=False,
        log_engine_metrics=False,  # they need ray[serve]
    )
    processor = build_processor(
        config,
        preprocess=lambda row: {
            "prompt": row["prompt"],
            "sampling_params": {"temperature": 0.0, "max_tokens": 16},
        },
        postprocess=lambda row: {"prompt": row["prompt"], "answer": row["generated_text"]},
    )
    prompts = [f"{n}. {SENTENCES[n % len(SENTENCES)]}" for n in range(args.prompts)]
    rows = processor(ray.data.from_items([{"prompt": prompt} for prompt in prompts])).take_all()
    for row in sorted(rows, key=lambda row: int(row["prompt"].split(".")[0])):
        print(f"{row['prompt']} -> {row['answer']}")
    return 0 if len(rows) == args.prompts and all(row["answer"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
