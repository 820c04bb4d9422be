"""On a GPU machine: the modules that only Triton's interpreter can run, in a process without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULES = ("test_bounds.py", "test_router.py")


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODULES)
def test_passes_without_the_gpu(name: str) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", Path(__file__).with_name(name)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:]
