"""What importing our packages loads, each in an interpreter of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

PROBE = """
import importlib, json, sys
for name in {names!r}:
    importlib.import_module(name)
torch = sys.modules.get("torch")
print(json.dumps({{
    "loaded": sorted({{name.split(".")[0] for name in sys.modules}}),
    "cuda_initialized": bool(torch is not None and torch.cuda.is_initialized()),
}}))
"""


def probe(*names: str) -> tuple[set[str], bool]:
    """Import `names`; return the top-level modules then loaded, and whether CUDA is initialised."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(names=names)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    return set(report["loaded"]), report["cuda_initialized"]


def test_package_loads_neither_vllm_nor_torch() -> None:
    loaded, cuda_initialized = probe("vllm_capmoe")
    assert "vllm_capmoe" in loaded
    assert not loaded & {"vllm", "torch", "triton", "transformers", "capmoe_kernels"}
    assert not cuda_initialized


def test_config_needs_the_standard_library_only() -> None:
    loaded, _ = probe("vllm_capmoe.config")
    assert not loaded & {"vllm", "torch", "triton", "numpy", "capmoe_kernels"}


@pytest.mark.parametrize("module", ["reference", "ops", "experts"])
def test_routing_and_experts_load_no_vllm_and_touch_no_gpu(module: str) -> None:
    loaded, cuda_initialized = probe(f"vllm_capmoe.{module}")
    assert "torch" in loaded
    assert "vllm" not in loaded
    assert not cuda_initialized


def test_kernels_know_neither_vllm_nor_the_plugin() -> None:
    package = importlib.util.find_spec("capmoe_kernels")
    assert package is not None and package.submodule_search_locations
    folder = package.submodule_search_locations[0]
    modules = [f[:-3] for f in sorted(os.listdir(folder)) if f.endswith(".py") and f[0] != "_"]
    loaded, cuda_initialized = probe("capmoe_kernels", *(f"capmoe_kernels.{m}" for m in modules))
    assert not loaded & {"vllm", "vllm_capmoe"}
    assert not cuda_initialized


def test_the_public_names_are_there_without_vllm() -> None:
    """`from vllm_capmoe import CapacityConfig, route` is the researchers' door: no vLLM needed."""
    code = (
        "import sys; sys.modules['vllm'] = None\n"  # any import of vllm now fails
        "from vllm_capmoe import CapacityConfig, Routing, register, route\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
