"""Every process or none: workers that aren't bound to what the front end was told don't serve."""

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
from engines import environment

import vllm_capmoe
from vllm_capmoe import CapacityConfig
from vllm_capmoe.integration import proof

SETTINGS = {"mode": "drop", "factor": 0.5}
CONFIG = SimpleNamespace(
    additional_config={"moe_capacity": SETTINGS},
    model_config=SimpleNamespace(model="a model"),
    parallel_config=SimpleNamespace(distributed_executor_backend="mp"),
)


LAUNCHED = SimpleNamespace(distributed_executor_backend="external_launcher")


def proven(layers: int = 2, version: str | None = None, **settings: Any) -> proof.Proof:
    made = proof.proof(CapacityConfig(**{**SETTINGS, **settings}), layers)
    return {**made, "version": version or made["version"]}


def worker(rank: int, given: proof.Proof | None) -> Any:
    methods = {} if given is None else {proof.METHOD: lambda: given}
    return SimpleNamespace(rank=rank, **methods)


class Executor:
    """Runs what it is given as vLLM's executors do: by cloudpickle."""

    vllm_config = CONFIG

    def __init__(self, *given: proof.Proof | None):
        self.workers = [worker(rank, each) for rank, each in enumerate(given)]

    def collective_rpc(self, method: Any, args: tuple[Any, ...]) -> list[Any]:
        return [cloudpickle.loads(cloudpickle.dumps(method))(each, *args) for each in self.workers]

    def get_kv_cache_specs(self) -> str:
        return "served"


VERSION = vllm_capmoe.__version__
HERE = rf"\(process {os.getpid()} on .*\)"

REFUSED = {
    "without the plugin": (None, f"worker 1 {HERE} is without the plugin .* {VERSION} is accepted"),
    "another version": (
        proven(version="9.9"),
        f"worker 1 {HERE} has vllm-capmoe 9.9: {VERSION}, as here, is accepted",
    ),
    "another factor": (
        proven(factor=2.0),
        f"worker 1 {HERE} is bound to factor 2.0: 0.5, as here, is accepted",
    ),
    "off": (
        proven(mode="off"),
        f"worker 1 {HERE} is bound to mode 'off': 'drop', as here, is accepted",
    ),
}


@pytest.mark.parametrize(("second", "message"), REFUSED.values(), ids=REFUSED)
def test_an_engine_with_another_worker_is_refused(second, message):
    served = proof._ask_workers_first(Executor.get_kv_cache_specs)
    with pytest.raises(ValueError, match=f"--moe-capacity-mode is 'drop', but {message}"):
        served(Executor(proven(), second))


@pytest.mark.parametrize("layers", [(2, 2), (0, 2), (0, 0)])
def test_a_stage_of_a_pipeline_may_be_without_moe_layers_but_not_all(layers):
    served = proof._ask_workers_first(Executor.get_kv_cache_specs)
    executor = Executor(*map(proven, layers))
    if any(layers):
        assert served(executor) == "served"
    else:
        with pytest.raises(ValueError, match="'drop', but it holds for no vLLM MoE layer of a m"):
            served(executor)
        executor.vllm_config = SimpleNamespace(
            **{**vars(CONFIG), "parallel_config": LAUNCHED}  # each stage by a process of its own
        )
        assert served(executor) == "served"


def test_what_is_asked_needs_no_plugin_in_the_worker(tmp_path):
    """It is sent by value: a worker without the package answers too, and says that it has none."""
    sent: list[Any] = []
    spy = SimpleNamespace(collective_rpc=lambda method, args: sent.append(method))
    proof.ask(spy)
    path = tmp_path / "asked"
    path.write_bytes(cloudpickle.dumps(sent[0]))
    code = (
        "import sys, types, pathlib, cloudpickle; sys.modules['vllm_capmoe'] = None;"
        f"asked = cloudpickle.loads(pathlib.Path({str(path)!r}).read_bytes());"
        f"print(asked(types.SimpleNamespace(rank=3), {proof.METHOD!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("('worker 3 (process ") and done.stdout.endswith(", None)\n")


class Core:
    """A client of two engines, as far as it asks them."""

    core_engines = (b"0", b"1")

    def __init__(self, *answers: Any):
        self.answers = dict(zip(self.core_engines, answers, strict=True))

    async def _call_utility_async(self, *call: Any, engine: bytes) -> Any:
        assert call == ("collective_rpc", proof.METHOD, None, (), {})
        answer = self.answers[engine]
        if isinstance(answer, Exception):
            raise answer
        return answer


MISSING = Exception(f"Call to collective_rpc failed: Method {proof.METHOD!r} is not implemented.")


@pytest.mark.parametrize(
    ("second", "error", "message"),
    [
        ([proven(), proven(0)], None, ""),
        ([proven(), proven(factor=2.0)], ValueError, "a worker of engine 1 is bound to factor 2"),
        (MISSING, ValueError, "a worker of engine 1 is without the plugin"),
        (RuntimeError("the engine died"), RuntimeError, "the engine died"),
    ],
)
def test_a_front_end_asks_all_engines(second, error, message):
    async def tasks(self: Any) -> str:
        return "generate"

    front_end = SimpleNamespace(vllm_config=CONFIG, engine_core=Core([proven()], second))
    served = proof._ask_engines_first(tasks)
    if error is None:
        assert asyncio.run(served(front_end)) == "generate"
        front_end.engine_core = None  # asked once
        assert asyncio.run(served(front_end)) == "generate"
    else:
        for _ in range(2):  # and not served at the second try either
            with pytest.raises(error, match=message):
                asyncio.run(served(front_end))


# Nothing of the plugin reaches the process that is started: VLLM_PLUGINS leaves it out there. (The
# front end's own check comes first, so the variable is set after it, as on another node.)
LACKING = """
import os
if __name__ == "__main__":
    import vllm_capmoe
    vllm_capmoe.register()
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor
    config = EngineArgs(
        model={model!r}, dtype="float32", enforce_eager=True, max_model_len=128,
        distributed_executor_backend={executor!r}, moe_capacity_mode="drop",
    ).create_engine_config()
    executor = Executor.get_class(config)
    os.environ["VLLM_PLUGINS"] = "other"
    engine = LLMEngine(
        vllm_config=config, executor_class=executor, log_stats=False,
        multiprocess_mode={processes},
    )
    engine.get_supported_tasks()
    print("SERVED")
"""


@pytest.mark.engine
@pytest.mark.parametrize(
    ("executor", "processes", "message"),
    [
        ("uni", True, "a worker of engine 0 is without the plugin"),
        ("mp", False, r"worker 0 \(process \d+ on .*\) is without the plugin"),
    ],
    ids=["engine core", "worker"],
)
def test_a_process_without_the_plugin_is_refused(
    example_model: Path, tmp_path: Path, executor: str, processes: bool, message: str
) -> None:
    script = tmp_path / "lacking.py"
    script.write_text(
        LACKING.format(model=str(example_model), executor=executor, processes=processes)
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment(VLLM_WORKER_MULTIPROC_METHOD="spawn"),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 1 and "SERVED" not in done.stdout, done.stdout[-3000:]
    last = [line for line in done.stderr.splitlines() if line.startswith("ValueError: ")][-1]
    assert re.search(f"--moe-capacity-mode is 'drop', but {message}", last), done.stderr[-3000:]
