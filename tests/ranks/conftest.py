"""Engines of two ranks for the tests, each in a process of its own, on the test platform."""

import json
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from clusters import CLUSTER, start
from engines import environment, free_port

RUNNER = Path(__file__).with_name("run_ranks.py")

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def run_ranks(example_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run an engine: run_ranks(requests, record=None, env={}, **engine keywords).

    Returns the result of run_ranks.py with the log beside it. float32, eager, no prefix caching
    unless said otherwise, so that runs can be compared.
    """
    folder = tmp_path_factory.mktemp("ranks")

    def run(
        requests: list[dict[str, Any]],
        *,
        record: str | None = None,
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
        number = len(list(folder.glob("*.spec.json")))
        before, after = folder / f"{number}.spec.json", folder / f"{number}.json"
        before.write_text(json.dumps({"engine": engine, "requests": requests, "record": record}))
        command = [sys.executable, str(RUNNER), str(before), str(after)]
        text = start(command, folder / f"{number}.log", 300, **(env or {}))
        result = json.loads(after.read_text()) | {"log": text}
        assert result["platform"] == "ClusterPlatform"
        return result

    return run


@pytest.fixture(scope="session")
def grouped_model(example_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DeepSeek-V3 with random weights and the example model's tokenizer.

    It has all that matters to ranks: experts in groups, without which vLLM places none round-robin;
    a shared expert; sequence parallel experts where attention is tensor and data parallel. Nine
    routed experts fit no number of ranks evenly.
    """
    import torch
    import transformers

    config = transformers.DeepseekV3Config(
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=512,  # 512 + 64: the head size that vLLM's MLA takes
        q_lora_rank=64,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
        n_routed_experts=9,
        n_group=3,
        topk_group=2,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=0,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        vocab_size=32000,
        max_position_embeddings=512,
        initializer_range=0.15,  # of real scale: the experts' output moves the residual
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    path = tmp_path_factory.mktemp("models") / "grouped"
    made.save_pretrained(path)
    for file in example_model.glob("*token*"):
        shutil.copy(file, path)
    return path


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Ray cluster of one node with two logical GPUs; the environment that finds it."""
    ray = Path(sys.executable).with_name("ray")
    folder = tmp_path_factory.mktemp("ray")
    port = free_port()
    # Without a token Ray would let anyone in who reaches the port.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [str(ray), "start", "--head", "--block", f"--port={port}", "--num-gpus=2"]
    command += ["--num-cpus=8", "--include-dashboard=false", "--disable-usage-stats"]
    command += ["--object-store-memory=100000000"]
    log = folder / "ray.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            env=environment(**CLUSTER, **token),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text(errors="replace"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield {"RAY_ADDRESS": f"127.0.0.1:{port}", **token}
    finally:
        # Politely it would drain the node first, for up to 30 s.
        for each in psutil.Process(process.pid).children(recursive=True):
            each.kill()
        process.kill()
        process.wait(30)
