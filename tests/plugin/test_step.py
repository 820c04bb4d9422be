"""What the router is told of a step's tokens by vLLM's model runner V2, the default on CUDA.

The engines of the other tests run V1, since the CPU has no V2.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm_capmoe.integration.step import StepTokens


def test_groups_are_those_of_the_step_or_where_a_graph_would_keep_them_the_most():
    tokens = StepTokens.allocate(8, 5, torch.device("cpu"))
    tokens.fill(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), torch.tensor([1, 2]))
    assert tokens.num_groups == 2
    tokens.request = SimpleNamespace(is_cuda=True)  # type: ignore[assignment]
    assert tokens.num_groups == 5


@pytest.mark.cpu
def test_model_runner_v2_says_which_tokens_are_generated_and_whose_they_are():
    """Its real code, interpreted."""
    script = Path(__file__).with_name("model_runner_v2.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
