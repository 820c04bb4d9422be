"""A configuration that is made in one process and served in another, as by Ray Serve."""

import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest
from engines import environment
from vllm.engine.arg_utils import AsyncEngineArgs

import vllm_capmoe

vllm_capmoe.register()

# vLLM loads no plugin in a process that only gets a configuration and makes an engine of it.
REPLICA = """
import pickle, sys
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import Executor
config = pickle.load(sys.stdin.buffer)
Executor.get_class(config)
for each in (AsyncLLM._run_output_handler, AsyncLLM.get_supported_tasks,
             LLMEngine.get_supported_tasks):
    print("front end:", each.__qualname__, hasattr(each, "__capmoe_wrapped__"))
"""


@pytest.mark.parametrize(
    ("mode", "env", "prepared"),
    [("drop", {}, 3), ("off", {}, 0), ("drop", {"VLLM_PLUGINS": "other"}, 0)],
    ids=["on", "off", "kept out"],
)
def test_a_replica_publishes_and_asks_for_the_proof(
    example_model: Path, mode: str, env: dict[str, str], prepared: int
) -> None:
    made = AsyncEngineArgs(model=str(example_model), moe_capacity_mode=mode).create_engine_config()
    done = subprocess.run(
        [sys.executable, "-c", REPLICA],
        input=cloudpickle.dumps(made),
        env=environment(**env),
        capture_output=True,
        check=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.decode().splitlines() if line.startswith("front end:")]
    assert len(lines) == 3
    assert sum(line.endswith(" True") for line in lines) == prepared
