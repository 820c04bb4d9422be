"""examples/ray_data.py on a real Ray cluster, and the engine arguments of both Ray examples."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from clusters import start
from vllm.engine.arg_utils import AsyncEngineArgs

import vllm_capmoe
from vllm_capmoe import CapacityConfig
from vllm_capmoe.integration.engine_args import capacity_config

vllm_capmoe.register()

LIMITED = CapacityConfig(mode="drop", factor=1.25)


@pytest.fixture(autouse=True)
def examples_on_path(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repo_root / "examples"))


def check(arguments: dict[str, object]) -> None:
    """vLLM takes them, and they mean what they say."""
    made = AsyncEngineArgs(**arguments)  # type: ignore[arg-type]
    assert capacity_config(made.additional_config) == LIMITED
    assert (made.tensor_parallel_size, made.enable_expert_parallel) == (2, True)


def test_engine_arguments_of_ray_data(example_model):
    from ray_data import engine_kwargs

    check({"model": str(example_model), **engine_kwargs(2, "drop", 1.25)})


@pytest.mark.skipif(find_spec("grpc_reflection") is None, reason="needs ray[serve]")
def test_engine_arguments_of_ray_serve(example_model):
    """What Ray Serve's own configuration class makes of them for vLLM."""
    from ray_serve import llm_config

    config = llm_config(str(example_model), 2, "drop", 1.25, "")
    arguments = config.get_engine_config().get_initialization_kwargs()
    assert arguments["distributed_executor_backend"] == "ray"
    check({**arguments, "distributed_executor_backend": None})


@pytest.mark.engine
@pytest.mark.cpu
def test_ray_data_answers_every_prompt(example_model, repo_root, ray_cluster, tmp_path):
    script = repo_root / "examples" / "ray_data.py"
    command = [sys.executable, str(script), str(example_model), "--prompts", "20", "--factor", "1"]
    text = start(command, tmp_path / "log", 550, **ray_cluster)
    answers = re.findall(r"^(\d+)\. .* -> (.+)$", text, re.MULTILINE)
    assert [int(number) for number, _ in answers] == list(range(20))
    assert all(answer.strip() for _, answer in answers)
    assert "MoE capacity: mode=expanded, factor=1.0" in text and "ranks=2" in text
