"""Two real Ray nodes, of which one has no vllm-capmoe: it must not serve without a limit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from clusters import CLUSTER, TENSOR_PARALLEL
from engines import environment, free_port
from overlays import make_overlay
from ray_nodes import ray_head, ray_worker

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.cpu]

RUNNER = Path(__file__).with_name("run_ranks.py")


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ray` of an environment without the package."""
    return make_overlay(tmp_path_factory.mktemp("without")).with_name("ray")


def test_an_engine_over_both_is_refused(example_model: Path, without: Path, tmp_path: Path) -> None:
    engine = {
        **TENSOR_PARALLEL,
        "model": str(example_model),
        "enforce_eager": True,
        "distributed_executor_backend": "ray",
        "moe_capacity_mode": "drop",
    }
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"engine": engine, "requests": [], "record": None}))
    with (
        ray_head(tmp_path, "--num-gpus=1", "--node-ip-address=127.0.0.1") as cluster,
        ray_worker(tmp_path, without, cluster, "--num-gpus=1"),
    ):
        done = subprocess.run(
            [sys.executable, RUNNER, spec, tmp_path / "result.json"],
            env=environment(**CLUSTER, **cluster),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert "worker 1 (process " in text and "is without the plugin and would serve" in text


def test_ray_serve_does_not_serve_there(
    example_model: Path, without: Path, repo_root: Path, tmp_path: Path
) -> None:
    """The only GPU is the other node's: there the configuration is made and the replica runs."""
    command = [sys.executable, str(repo_root / "examples" / "ray_serve.py"), str(example_model)]
    command += ["--ranks", "1", "--mode", "drop", "--port", str(free_port())]
    with (
        ray_head(tmp_path, "--num-gpus=0", "--node-ip-address=127.0.0.1") as cluster,
        ray_worker(tmp_path, without, cluster, "--num-gpus=1"),
    ):
        done = subprocess.run(
            command,
            env=environment(**CLUSTER, **cluster),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=500,
        )
    assert done.returncode != 0
    assert "Deploying application default failed" in done.stdout
    assert "initialize_worker" in done.stdout
    assert "ModuleNotFoundError: No module named 'vllm_capmoe'" in done.stdout
