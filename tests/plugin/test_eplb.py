"""Capacity is decided on logical experts; vLLM maps what is left to the replicas of EPLB."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.cpu
def test_vllms_mapping_comes_after_the_limit():
    """Its real kernel, interpreted. An engine with EPLB needs GPUs."""
    script = Path(__file__).with_name("eplb_mapping.py")
    helpers = str(script.parent.parent / "helpers")
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": helpers},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
