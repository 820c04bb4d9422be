"""Runs one offline engine in a process of its own: a JSON specification in, a JSON result out.

    python run_engine.py SPEC.json RESULT.json

SPEC: {"engine": keywords of LLM(...), "batches": [[prompt, ...], ...], "max_tokens": n,
"capacity": whether the plugin's worker methods are there to be asked, "changes": for every batch
the settings that change before it, or None}. Every batch is one call of `LLM.generate`, greedy,
with log-probabilities of the prompt's tokens and of the generated ones.
"""

import json
import sys
from pathlib import Path
from typing import Any

# The seams of the execution path that the plugin may patch in a worker.
SEAMS = (
    ("vllm.model_executor.layers.fused_moe.layer", "", "create_fused_moe_router"),
    (
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method",
        "",
        "select_unquantized_moe_backend",
    ),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_prepare_inputs"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner", "prepare_inputs"),
)


def patched_seams(worker: Any, seams: Any) -> list[str]:
    """Which seams are patched in the worker's process (sent there by collective_rpc)."""
    import importlib

    found = []
    for module, cls, name in seams:
        owner = importlib.import_module(module)
        owner = getattr(owner, cls) if cls else owner
        if getattr(getattr(owner, name), "__capmoe_wrapped__", False):
            found.append(name)
    return found


def as_dict(output: Any) -> dict[str, Any]:
    """What the tests compare of one request's output."""
    completion = output.outputs[0]
    prompt_logprobs = [
        position[token].logprob
        for token, position in zip(
            output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
        )
    ]
    top = [
        sorted(((entry.logprob, token) for token, entry in position.items()), reverse=True)
        for position in completion.logprobs
    ]
    return {
        "prompt_tokens": len(output.prompt_token_ids),
        "token_ids": list(completion.token_ids),
        "text": completion.text,
        "prompt_logprobs": prompt_logprobs,
        "top": top,
    }


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    import vllm_capmoe

    if any(key.startswith("moe_capacity_") for key in spec["engine"]):
        vllm_capmoe.register()
    from vllm import LLM, SamplingParams

    llm = LLM(**spec["engine"])
    sampling = SamplingParams(
        temperature=0, max_tokens=spec["max_tokens"], logprobs=2, prompt_logprobs=0
    )
    result: dict[str, Any] = {"batches": [], "records": [], "counters": None}
    result["patched"] = llm.collective_rpc(patched_seams, args=(SEAMS,))[0]
    result["now"] = []
    changes = spec.get("changes") or [None] * len(spec["batches"])
    for prompts, change in zip(spec["batches"], changes, strict=True):
        if change:
            result["now"].append(vllm_capmoe.change_settings(llm, **change))
        if spec["capacity"]:
            llm.collective_rpc("moe_capacity_record", args=(True,))
        result["batches"].append([as_dict(o) for o in llm.generate(prompts, sampling)])
        if spec["capacity"]:
            result["records"].append(llm.collective_rpc("moe_capacity_records")[0])
    if spec["capacity"]:
        result["counters"] = llm.collective_rpc("moe_capacity_counters")[0]
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
