"""Engines of two ranks for the tests, each in a process of its own, on the test platform."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from clusters import CLUSTER
from engines import environment, free_port
from ray_nodes import ray_head

RUNNER = Path(__file__).with_name("run_ranks.py")

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def run_ranks(
    example_model: Path, tmp_path_factory: pytest.TempPathFactory, run_script: Callable[..., str]
) -> Run:
    """Run an engine: run_ranks(requests, record=None, changes=None, env={}, **engine keywords).

    Returns the result of run_ranks.py with the log beside it. float32, eager, no prefix caching
    unless said otherwise, so that runs can be compared.
    """
    folder = tmp_path_factory.mktemp("ranks")

    def run(
        requests: list[dict[str, Any]],
        *,
        record: str | None = None,
        changes: list[dict[str, Any]] | None = None,
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
        spec = {"engine": engine, "requests": requests, "record": record, "changes": changes}
        before.write_text(json.dumps(spec))
        log, settings = folder / f"{number}.log", environment(**{**CLUSTER, **(env or {})})
        text = run_script(RUNNER, [str(before), str(after)], log, settings)
        result = json.loads(after.read_text()) | {"log": text}
        assert result["platform"] == "ClusterPlatform"
        return result

    return run


@pytest.fixture(scope="session")
def nine_experts(example_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3-MoE with random weights and the example model's tokenizer.

    Unlike Mixtral it has sequence parallel experts where attention is tensor and data parallel, and
    nine experts fit no number of ranks evenly. Not a DeepSeek: vLLM's CPU attention for unequal
    heads of keys and values gives other results from one process to the next, without us, too.
    """
    import torch
    import transformers

    config = transformers.Qwen3MoeConfig(
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=9,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        vocab_size=32000,
        max_position_embeddings=512,
        initializer_range=0.15,  # of real scale: the experts' output moves the residual
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for key, parameter in made.named_parameters():
        if "gate.weight" in key:
            parameter.data *= 4.0  # a router that decides
    path = tmp_path_factory.mktemp("models") / "nine"
    made.save_pretrained(path)
    for file in example_model.glob("*token*"):
        shutil.copy(file, path)
    return path


@pytest.fixture(scope="module")
def ray_metrics() -> str:
    """Where the node of `ray_cluster` shows its metrics to Prometheus."""
    return f"http://127.0.0.1:{free_port()}/metrics"


@pytest.fixture(scope="module")
def ray_cluster(
    ray_metrics: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """A Ray cluster of one node with two logical GPUs; the environment that finds it.

    It gets along with another one beside it: none of its ports is Ray's default.
    """
    metrics = f"--metrics-export-port={urlsplit(ray_metrics).port}"
    with ray_head(tmp_path_factory.mktemp("ray"), "--num-gpus=2", metrics) as cluster:
        yield cluster
