"""What the router is told of a step's tokens by vLLM's model runner V2, the default on CUDA.

The engines of the other tests run V1, since the CPU has no V2.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.cpu
def test_model_runner_v2_says_which_tokens_are_generated_and_whose_they_are():
    """Its real code, interpreted."""
    script = Path(__file__).with_name("model_runner_v2.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
