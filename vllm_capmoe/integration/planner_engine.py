"""The engines of the planner, each in a process of its own.

    python -m vllm_capmoe.integration.planner_engine observe|answer|time SPEC.json RESULT.jsonl DONE

The specification: "engine", the arguments of `vllm serve`'s engine as a list of words; "prompts";
"max_tokens"; "settings", the keys of `additional_config["moe_capacity"]`; for `observe` also
"trials", "ep_size" and "requests". The result gets a line for each chunk of prompts when the chunk
is done, so a run that was cut short goes on where it ended: the first DONE prompts are passed over.
For `time` what stands for a prompt is a number of requests and its k0: see `run_times`.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_capmoe.integration.settings import KEY

TURNS = 5, 24  # least and most, of every k0 that is timed, after one to warm up
CHUNK = 32  # prompts of one call of the engine, after which the result is saved
TOP = 8  # log-probabilities per prompt position, for KL divergences; the rest counts as one token

Counted = dict[int, dict[str, float]]  # by number of the layer


def engine_args(words: list[str], settings: dict[str, Any]) -> Any:
    """vLLM's `EngineArgs` of a command line, with settings of the plugin over what it says.

    Raises:
        SystemExit: argparse refused a word, and has said so.
    """
    from vllm_capmoe.integration import register

    register()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm-capmoe plan"))
    made = EngineArgs.from_cli_args(parser.parse_args(words))
    own = dict(made.additional_config or {})
    made.additional_config = {**own, KEY: {**own.get(KEY, {}), **settings}}
    return made


def conversations(prompts: list[Any], size: int = CHUNK) -> Iterator[tuple[bool, list[Any]]]:
    """The prompts in chunks, texts and chats apart, in their order: whether chats, the chunk."""
    chunk: list[Any] = []
    for prompt in prompts:
        if chunk and (isinstance(chunk[0], str) != isinstance(prompt, str) or len(chunk) == size):
            yield not isinstance(chunk[0], str), chunk
            chunk = []
        chunk.append(prompt)
    if chunk:
        yield not isinstance(chunk[0], str), chunk


def run(spec: dict[str, Any], result: Path, done: int, observe: bool) -> None:
    """Run all prompts but the first `done`; `result` gets a line for each chunk."""
    made = engine_args(spec["engine"], spec["settings"])
    from tqdm import tqdm
    from vllm import LLM, SamplingParams

    llm = LLM.from_engine_args(made)
    sampling = SamplingParams(
        temperature=0,
        max_tokens=spec["max_tokens"],
        prompt_logprobs=None if observe else TOP,
    )
    limited = not observe and spec["settings"]["mode"] != "off"
    seen: Counted = {}
    bar = tqdm(total=len(spec["prompts"]), initial=done, unit=" prompts", leave=False)
    size = max([CHUNK, *spec.get("requests", ())])
    for chats, chunk in conversations(spec["prompts"][done:], size):
        if observe:
            tried = (spec["trials"], spec["ep_size"], spec["requests"])
            llm.collective_rpc("moe_capacity_try", args=tried)
        fitting = [prompt for prompt in chunk if _fits(llm, prompt, spec["max_tokens"])]
        call = llm.chat if chats else llm.generate
        start = time.perf_counter()
        outputs = call(fitting, sampling, use_tqdm=False) if fitting else []
        seconds = time.perf_counter() - start
        counted: dict[str, Any] = {"prompts": len(chunk), "left_out": len(chunk) - len(fitting)}
        if observe:
            counted |= {
                "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
                "output_tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
                "layers": _layers(llm.collective_rpc("moe_capacity_tried")),
            }
        else:
            before, seen = seen, _counted(llm) if limited else {}
            new = {number: _less(layer, before.get(number)) for number, layer in seen.items()}
            answers = [_answer(output) for output in outputs]
            counted |= {"seconds": seconds, "answers": answers, "layers": new}
        with result.open("a") as file:
            file.write(json.dumps(counted) + "\n")
        bar.update(len(chunk))
    bar.close()


def run_times(spec: dict[str, Any], result: Path, done: int) -> None:
    """Time decode steps of so many "requests" with each of some "keeps", in turns.

    Each turn has other prompts of "pool", as many as there are, or the same again. A line has
    "milliseconds", by k0 the time per output token of a request, one number for each turn, and
    "active", by k0 the experts that a layer loaded in a decode step.
    """
    made = engine_args(spec["engine"], spec["settings"])
    made.disable_log_stats = False  # times of each request
    made.enable_prefix_caching = False
    from tqdm import tqdm
    from vllm import LLM, SamplingParams

    llm = LLM.from_engine_args(made)
    sampling = SamplingParams(temperature=0, max_tokens=spec["max_tokens"], ignore_eos=True)
    pool = [prompt for prompt in spec["pool"] if _fits(llm, prompt, spec["max_tokens"])]
    for batch in tqdm(spec["prompts"][done:], unit=" batches", leave=False):
        size = batch["requests"]
        groups = [pool[at : at + size] for at in range(0, len(pool) - size + 1, size)]
        keeps = [str(keep) for keep in batch["keeps"]]
        times: dict[str, list[float]] = {keep: [] for keep in keeps}
        loads = {keep: [0, 0] for keep in keeps}
        turns = min(max(len(groups), TURNS[0]), TURNS[1])
        for turn in range(1 + turns):
            prompts = groups[turn % len(groups)]
            for keep in keeps if turn % 2 else reversed(keeps):
                llm.collective_rpc("moe_capacity_change", args=({"decode_keep": int(keep)},))
                before = _decode_steps(llm)
                outputs = []
                for chats, chunk in conversations(prompts, len(prompts)):
                    call = llm.chat if chats else llm.generate
                    outputs += call(chunk, sampling, use_tqdm=False)
                if turn:
                    times[keep].append(statistics.median(map(_per_token, outputs)))
                    for at, (now, old) in enumerate(zip(_decode_steps(llm), before, strict=True)):
                        loads[keep][at] += now - old
        active = {keep: loaded / max(1, steps) for keep, (steps, loaded) in loads.items()}
        line = {"prompts": 1, "milliseconds": times, "active": active}
        with result.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _per_token(output: Any) -> float:
    """Milliseconds between two tokens of an answer."""
    metrics = output.metrics
    span: float = metrics.last_token_ts - metrics.first_token_ts
    return 1e3 * span / max(1, metrics.num_generation_tokens - 1)


def _decode_steps(llm: Any) -> tuple[int, int]:
    """Steps without a prompt token, and the experts that were loaded in them, over all layers."""
    from vllm_capmoe.integration.stats import by_layer

    layers = by_layer([llm.collective_rpc("moe_capacity_counters")])
    steps = sum(layer["steps"] - layer["prompt_steps"] for layer in layers)
    return steps, sum(layer["decode_active_after"] for layer in layers)


def _fits(llm: Any, prompt: Any, max_tokens: int) -> bool:
    """Whether the model takes a prompt with so many tokens after it."""
    tokenizer = llm.get_tokenizer()
    if not isinstance(prompt, str):
        prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    most: int = llm.llm_engine.model_config.max_model_len
    return len(tokenizer.encode(prompt)) + max_tokens <= most


def _counted(llm: Any) -> Counted:
    """What the layers have counted since the engine started: the keys of `Counts` that serving
    counts too, layer by layer.
    """
    from vllm_capmoe.integration.stats import by_layer
    from vllm_capmoe.layer_settings import layer_number
    from vllm_capmoe.ranking import MASS_BITS

    found: Counted = {}
    for layer in by_layer([llm.collective_rpc("moe_capacity_counters")]):
        counts = {
            "steps": layer["steps"],
            "assignments": sum(layer["load_before"]),
            "dropped": layer["dropped"],
            "added": layer["expanded"],
            "left_without": layer["left_without"],
            "mass": layer["mass"] * 2.0**-MASS_BITS,
            "lost": layer["lost"] * 2.0**-MASS_BITS,
            "peak_before": layer["max_before"],
            "peak_after": layer["max_after"],
            "active_before": layer["prompt_active_before"] + layer["decode_active_before"],
            "active_after": layer["prompt_active_after"] + layer["decode_active_after"],
        }
        number = layer_number(layer["layer"])
        found[number] = {key: counts[key] + found.get(number, {}).get(key, 0) for key in counts}
    return found


def _less(counts: dict[str, float], before: dict[str, float] | None) -> dict[str, float]:
    """What is new since `before`."""
    return {key: value - (before or {}).get(key, 0) for key, value in counts.items()}


def _layers(workers: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each layer once: tensor parallel workers count alike, pipeline stages have their own."""
    return list({layer["number"]: layer for worker in workers for layer in worker}.values())


def _answer(output: Any) -> dict[str, Any]:
    """The text, and for each position of the prompt but the first: the log-probability of its
    token, and the most likely tokens with theirs.
    """
    positions = [
        {
            "logprob": found[token].logprob,
            "top": {str(other): entry.logprob for other, entry in found.items()},
        }
        for token, found in zip(
            output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
        )
    ]
    completion = output.outputs[0]
    return {
        "text": completion.text,
        "tokens": len(completion.token_ids),
        "positions": positions,
    }


if __name__ == "__main__":
    kind, spec_file, result_file, passed_over = sys.argv[1:]
    specification = json.loads(Path(spec_file).read_text())
    if kind == "time":
        run_times(specification, Path(result_file), int(passed_over))
    else:
        run(specification, Path(result_file), int(passed_over), kind == "observe")
