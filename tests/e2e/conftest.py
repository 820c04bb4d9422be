"""Real engines for the end-to-end tests: offline runs, each in a process of its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import environment

RUNNER = Path(__file__).with_name("run_engine.py")

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def run(
    example_model: Path, tmp_path_factory: pytest.TempPathFactory, run_script: Callable[..., str]
) -> Run:
    """Run an offline engine; equal calls are answered from the first one's result.

    run(batches, max_tokens=8, plugin=True, changes=None, env={}, **engine keywords) -> the result
    of run_engine.py. float32, eager and without prefix caching unless said otherwise, so that runs
    can be compared.
    """
    folder = tmp_path_factory.mktemp("runs")
    done: dict[str, dict[str, Any]] = {}

    def start(
        batches: list[list[str]],
        *,
        max_tokens: int = 8,
        plugin: bool = True,
        changes: list[dict[str, Any] | None] | None = None,
        env: dict[str, str] | None = None,
        **engine: Any,
    ) -> dict[str, Any]:
        engine = {
            "model": str(example_model),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 512,
            "max_num_seqs": 32,
            "max_num_batched_tokens": 2048,
            "enable_prefix_caching": False,
            **engine,
        }
        asked = {**engine, **engine.get("additional_config", {}).get("moe_capacity", {})}
        mode = asked.get("moe_capacity_mode", asked.get("mode", "off"))
        spec = {
            "engine": engine,
            "batches": batches,
            "max_tokens": max_tokens,
            "changes": changes,
            "capacity": mode != "off" or asked.get("moe_capacity_decode_keep", "off") != "off",
        }
        key = json.dumps([spec, plugin, env], sort_keys=True)
        if key not in done:
            number = len(done)
            before, after = folder / f"{number}.spec.json", folder / f"{number}.json"
            log = folder / f"{number}.log"
            before.write_text(json.dumps(spec))
            # The engine core in the client's process: all requests are queued before the first
            # step, so batches are the same in every run. Workers stay processes of their own.
            more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            if not plugin:
                more["VLLM_PLUGINS"] = ""
            text = run_script(
                RUNNER, [str(before), str(after)], log, environment(**more, **(env or {}))
            )
            done[key] = json.loads(after.read_text()) | {"log": text}
        return done[key]

    return start
