"""`vllm-capmoe plan`: from arguments to files and text."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm_capmoe.config import OPTIONS, CapacityConfig
from vllm_capmoe.planner import check, page, prompts, report, verdict
from vllm_capmoe.planner.counts import Counts, Observation
from vllm_capmoe.planner.grid import trials
from vllm_capmoe.planner.results import read
from vllm_capmoe.version import own_version

ENGINE = "vllm_capmoe.integration.planner_engine"


def share(text: str) -> float:
    """A share such as "1%" or "0.01".

    Raises:
        argparse.ArgumentTypeError: it is none, or isn't between 0 and 1.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(%?)", text.strip())
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"it is {text!r}, but '1%' or 0.01 is accepted")
    return value


def count(text: str) -> int:
    """An integer of at least 1.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it is {text!r}, but an integer >= 1 is accepted")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="as for vllm serve")
    parser.add_argument("--prompts", required=True, type=Path, help="JSON lines: texts or chats")
    parser.add_argument(
        "--ep-size", type=count, help="expert parallel ranks (default: the engine's)"
    )
    parser.add_argument(
        "--max-loss", type=share, default=0.01, metavar="SHARE",
        help="share of the gate mass that may be lost (default: 1%%)",
    )  # fmt: skip
    parser.add_argument("--max-prompts", type=count, help="take the first N prompts only")
    parser.add_argument(
        "--max-output-tokens", type=count, default=32, metavar="N",
        help="tokens to generate for each prompt (default: 32)",
    )  # fmt: skip
    parser.add_argument(
        "--requests", type=count, nargs="+", metavar="N",
        help="requests that generate at once, for the verdict on decode keep (default: 16, or as "
        "many as there are prompts)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("capacity-plan"), metavar="FOLDER",
        help="gets plan.json, plan.html and layers.json (default: capacity-plan); a run that was "
        "cut short goes on from there",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true",
        help="then run the prompts with and without the planned settings, and compare",
    )  # fmt: skip


def plan(arguments: argparse.Namespace, engine: list[str]) -> str:
    """Observe, decide, write the files; returns what to print.

    engine: further arguments of vLLM's engine.

    Raises:
        ValueError: what was asked for can't be done, as one sentence.
    """
    asked = prompts.read(arguments.prompts, arguments.max_prompts)
    words = ["--model", arguments.model, *engine, "--enforce-eager"]
    inspected = _inspect(words, arguments.ep_size)
    base, ranks = inspected.base, inspected.ranks
    requests = _requests(arguments.requests, len(asked))
    if arguments.check and base.level == "device" and ranks != inspected.engine_ranks:
        raise ValueError(
            f"--check with --moe-capacity-level 'device' runs on {inspected.engine_ranks} ranks, "
            f"but the plan is for {ranks}: the same number is accepted."
        )
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    spec = {
        "engine": words,
        "prompts": asked,
        "max_tokens": arguments.max_output_tokens,
        "versions": inspected.versions,
    }
    tried = trials(base, inspected.top_k)
    observing = {**base.to_dict(), "mode": "drop", "observe": True}
    observed = _run(
        "observe",
        out,
        spec
        | {
            "settings": observing,
            "trials": {trial.name: trial.config.to_dict() for trial in tried},
            "ep_size": ranks,
            "requests": requests,
        },
    )
    observation = Observation.of_chunks(arguments.model, ranks, list(observed))
    found = verdict.decide(observation, arguments.max_loss)
    decode = verdict.decode_advice(observation, requests, arguments.max_loss)
    timing = {
        "engine": ["--model", arguments.model, *engine],  # as it is served: graphs and compilation
        "pool": asked,
        "prompts": [{"requests": advice.requests, "keeps": advice.keeps} for advice in decode],
        "settings": {"mode": "off", "scope": "batch", "decode_keep": 1},
    }
    timed = _run("time", out, spec | timing, "timed") if decode else iter(())
    decode = [
        verdict.judge_decode(advice, times, arguments.max_loss)
        for advice, times in zip(decode, timed, strict=True)
    ]
    plain = report.plain(observation, found, decode)
    text = report.text(observation, found, decode)
    layers = out / "layers.json"
    layers.write_text(json.dumps(found.limits.settings(), indent=2) + "\n")
    settings = _settings(base, found.limits.mode, ranks)
    if arguments.check:
        off = {"settings": {**base.to_dict(), "mode": "off"}}
        on = {"settings": {**settings.to_dict(), "layers": found.limits.settings()}}
        # A step of decode tokens alone is plain top-k under every limit.
        predicted = {
            layer.number: found.limits.by_layer[layer.number]
            + layer.decode.get(tried[0].name, Counts())
            for layer in observation.layers
        }
        result = check.compare(
            _run("answer", out, spec | off, "without"),
            _run("answer", out, spec | on, "with"),
            predicted,
        )
        plain["check"] = asdict(result)
        text += "\n\n" + result.text()
    (out / "plan.json").write_text(json.dumps(plain, indent=2) + "\n")
    (out / "plan.html").write_text(page.html(observation, found, decode))
    files = f"Files: {out / 'plan.html'}, {out / 'plan.json'}, {layers}"
    if not found.worth:
        return f"{text}\n\n{files}"
    return f"{text}\n\nTo use it: {_flags(settings, layers)}\n{files}"


def _requests(given: list[int] | None, prompts: int) -> list[int]:
    """How many requests generate at once, for decode keep; none where it is refused.

    Raises:
        ValueError: more than there are prompts.
    """
    if given and max(given) > prompts:
        raise ValueError(
            f"--requests is {max(given)}, but there are {prompts} prompts: up to as many are "
            "accepted."
        )
    if os.environ.get("VLLM_BATCH_INVARIANT") == "1":
        return []
    return sorted(set(given)) if given else [min(16, prompts)]


def _settings(base: CapacityConfig, mode: str, ranks: int) -> CapacityConfig:
    """What was tried, with no `auto` whose meaning depends on the ranks that are there."""
    several = ranks > 1 and mode == "expanded" and base.max_experts == "auto"
    return replace(base, mode=mode, max_experts="none" if several else base.max_experts)


def _flags(settings: CapacityConfig, layers: Path) -> str:
    """The settings as flags of `vllm serve`, for a shell."""
    words = []
    for option in OPTIONS:
        value = getattr(settings, option.key)
        if value != option.default:
            words += [option.flag, str(value)]
    return shlex.join([*words, "--moe-capacity-layers", f"@{layers}"])


@dataclass(frozen=True)
class Inspected:
    """What the model's configuration and the engine's arguments say.

    base: the settings that all trials share. top_k: k. ranks: those to plan for. engine_ranks:
    expert parallel ranks of the engine that runs the plan. versions: of the plugin and of vLLM.
    """

    base: CapacityConfig
    top_k: int
    ranks: int
    engine_ranks: int
    versions: list[str]


def _inspect(words: list[str], ep_size: int | None) -> Inspected:
    """Read the engine's arguments and the model's configuration; no weights.

    Raises:
        ValueError: the engine wouldn't start, the ranks don't divide the experts, or a setting is
            given that a plan finds by itself.
    """
    with _quiet():
        from vllm_capmoe.integration import compat, planner_engine
        from vllm_capmoe.integration.settings import capacity_config

        settings = {"mode": "drop", "observe": True, "layers": {}}
        try:
            engine = planner_engine.engine_args(words, settings).create_engine_config()
        except Exception as error:  # pydantic, transformers, OSError: all say why in their text
            raise ValueError(_one_sentence(str(error))) from error
    parallel, model = engine.parallel_config, engine.model_config
    if parallel.data_parallel_size > 1:
        raise ValueError(
            f"--data-parallel-size is {parallel.data_parallel_size}, but a plan runs in one "
            "engine: 1 is accepted, with --ep-size for the ranks to plan for."
        )
    engine_ranks = parallel.tensor_parallel_size if parallel.enable_expert_parallel else 1
    ranks = ep_size or engine_ranks
    experts = model.get_num_experts()
    if experts % ranks:
        raise ValueError(f"--ep-size is {ranks}, but it must divide the model's {experts} experts.")
    base = capacity_config(planner_engine.engine_args(words, {}).additional_config)
    for key in ("mode", "decode_keep", "observe", "layers"):
        option = next(option for option in OPTIONS if option.key == key)
        if getattr(base, key) != option.default:
            raise ValueError(
                f"{option.flag} is given, but a plan finds it by itself: the other settings of the "
                "plugin are accepted."
            )
    versions = [own_version(), compat.vllm_version()]
    return Inspected(base, model.get_num_experts_per_tok(), ranks, engine_ranks, versions)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without vLLM's log, unless a level is asked for: the engine's log says it all again.

    The level must not stay in the environment: processes started later would inherit it.
    """
    given = os.environ.get("VLLM_LOGGING_LEVEL")
    os.environ["VLLM_LOGGING_LEVEL"] = given or "ERROR"
    try:
        yield
    finally:
        if given is None:
            del os.environ["VLLM_LOGGING_LEVEL"]


def _one_sentence(text: str) -> str:
    """What an error says first, without pydantic's frame."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = next((line for line in lines if "--moe-" in line or "error," in line), lines[0])
    return re.sub(r"^(Value|Assertion) error, ", "", said).split(" [type=")[0]


def _run(
    kind: str, out: Path, spec: dict[str, Any], name: str = "observed"
) -> Iterator[dict[str, Any]]:
    """An engine's process from start to end, unless its result is there; the result's chunks.

    Raises:
        ValueError: it failed; what it said is in the log and above.
    """
    given, result, log = (out / f"{name}.{end}" for end in ("spec.json", "jsonl", "log"))
    text = json.dumps(spec)
    if not given.exists() or given.read_text() != text:
        result.unlink(missing_ok=True)
        given.write_text(text)
    passed_over = sum(chunk["prompts"] for chunk in read(result))
    if passed_over < len(spec["prompts"]):
        what = "sizes of a step" if kind == "time" else "prompts"
        print(f"{name}: {len(spec['prompts'])} {what}; the engine's log is {log}", file=sys.stderr)
        command = [sys.executable, "-m", ENGINE, kind, str(given), str(result), str(passed_over)]
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
        with log.open("w") as stdout:
            # The progress bar, on stderr, is for the person who waits; vLLM's log is not.
            done = subprocess.run(command, stdout=stdout, env=environment, check=False)
        if done.returncode:
            raise ValueError(
                f"the engine ended with status {done.returncode}: its error is above, its log is "
                f"{log}."
            )
    return read(result)
