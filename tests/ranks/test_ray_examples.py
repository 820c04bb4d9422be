"""The Ray examples on a real Ray cluster, and the engine arguments that they make."""

import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openai
import pytest
from clusters import CLUSTER, start
from engines import environment, free_port
from vllm.engine.arg_utils import AsyncEngineArgs

import vllm_capmoe
from vllm_capmoe import CapacityConfig
from vllm_capmoe.integration.settings import capacity_config

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


needs_serve = pytest.mark.skipif(
    find_spec("grpc_reflection") is None, reason="needs ray[serve] and grpcio-reflection"
)


@needs_serve
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


def series(url: str) -> dict[str, float]:
    """The sums of vLLM's series, ours among them, that a node of a Ray cluster shows."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        if line.startswith("ray_vllm_"):
            name, value = line.split("{")[0].removeprefix("ray_vllm_"), line.rsplit(" ", 1)[1]
            found[name] = found.get(name, 0.0) + float(value)
    return found


@needs_serve
@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.cpu
def test_ray_serve_answers_and_exports_our_series(
    example_model, repo_root, ray_cluster, ray_metrics, tmp_path
):
    """Ray makes the configuration in a task, and sends it to the replica, whose series these are.

    That the replica got what it needs also asks its engine for the proof.
    """
    script, port = repo_root / "examples" / "ray_serve.py", free_port()
    command = [sys.executable, str(script), str(example_model), "--ranks", "1", "--mode", "drop"]
    command += ["--factor", "0.5", "--port", str(port)]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=environment(**CLUSTER, **ray_cluster), stdout=out, stderr=out
        )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    deadline = time.monotonic() + 400

    def until(ready: Callable[[], Any]) -> Any:
        """Its answer, once there is one and not an error."""
        while True:
            assert process.poll() is None, f"the example ended:\n{log.read_text()[-6000:]}"
            try:
                if answer := ready():
                    return answer
            except (openai.APIError, OSError):
                pass
            assert time.monotonic() < deadline, log.read_text()[-6000:]
            time.sleep(1)

    try:
        answer = until(
            lambda: client.completions.create(
                model=example_model.name, prompt="Once upon a time " * 20, max_tokens=8
            )
        )
        found = until(
            lambda: (
                (shown := series(ray_metrics)).get("moe_capacity_assignments_total")
                and "prompt_tokens_total" in shown
                and shown
            )
        )
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0, log.read_text()[-6000:]
    # Every token but the last one passes four layers, with two experts each.
    assert found["prompt_tokens_total"] == answer.usage.prompt_tokens > 80
    assert found["moe_capacity_assignments_total"] == (answer.usage.total_tokens - 1) * 4 * 2
    assert found["moe_capacity_dropped_assignments_total"] > 0
