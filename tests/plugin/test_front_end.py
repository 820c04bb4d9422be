"""A configuration that is made in one process and served in another, as by Ray Serve."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from engines import environment
from overlays import make_overlay
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.executor.abstract import Executor

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


def replica(python: Path | str, made: Any, **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [python, "-P", "-c", REPLICA],  # -P: this folder has the package
        input=made,
        env=environment(**env),
        capture_output=True,
        check=False,
        timeout=300,
    )


def made(model: Path, mode: str) -> Any:
    return AsyncEngineArgs(model=str(model), moe_capacity_mode=mode).create_engine_config()


@pytest.mark.parametrize(("mode", "prepared"), [("drop", 3), ("off", 0)])
def test_a_replica_publishes_and_asks_for_the_proof(example_model, mode, prepared):
    done = replica(sys.executable, cloudpickle.dumps(made(example_model, mode)))
    lines = [line for line in done.stdout.decode().splitlines() if line.startswith("front end:")]
    assert len(lines) == 3, done.stderr.decode()
    assert sum(line.endswith(" True") for line in lines) == prepared


def test_a_replica_from_which_the_plugin_is_kept_out_makes_no_engine(example_model):
    config = cloudpickle.dumps(made(example_model, "drop"))
    done = replica(sys.executable, config, VLLM_PLUGINS="other")
    assert done.returncode != 0
    assert "VLLM_PLUGINS is 'other', which keeps this plugin out" in done.stderr.decode()


def test_a_replica_without_the_package_reads_only_what_a_front_end_had(example_model, tmp_path):
    """Engine cores and workers are asked for their proof; of a replica nobody would ask for one."""
    python = make_overlay(tmp_path / "without")
    config = made(example_model, "drop")
    done = replica(python, cloudpickle.dumps(config))
    assert done.returncode != 0
    assert "No module named 'vllm_capmoe'" in done.stderr.decode().splitlines()[-1]
    Executor.get_class(config)
    done = replica(python, cloudpickle.dumps(config))
    assert done.returncode == 0, done.stderr.decode()
    assert replica(python, cloudpickle.dumps(made(example_model, "off"))).returncode == 0


def test_a_worker_that_requires_the_package_has_it_registered():
    command = "import vllm_capmoe; from vllm.v1.worker.worker_base import WorkerBase as W;"
    command += "print(hasattr(W.__init__, '__capmoe_wrapped__'), end=' '); vllm_capmoe.Required;"
    command += "print(hasattr(W.__init__, '__capmoe_wrapped__'))"
    env = environment(VLLM_PLUGINS="other")
    run = subprocess.run([sys.executable, "-c", command], env=env, capture_output=True, check=True)
    assert run.stdout.decode().splitlines()[-1] == "False True"
