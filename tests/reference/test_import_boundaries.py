"""What importing our packages loads, each in an interpreter of its own."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The modules of `integration` that only a worker with a mode needs.
PATH = ("router", "experts", "layers", "step", "phantom", "custom_ops")

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


def test_the_contract_needs_the_standard_library_only() -> None:
    loaded, _ = probe("capmoe_kernels.contract", "vllm_capmoe.plan")
    assert not loaded & {"vllm", "torch", "triton", "numpy"}


def test_the_paper_shares_nothing_with_what_it_judges() -> None:
    loaded, _ = probe("vllm_capmoe.reference")
    assert not loaded & {"vllm", "torch", "triton", "capmoe_kernels"}


@pytest.mark.parametrize("module", ["torch_routing", "ops", "experts"])
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


def imports_of(path: Path) -> set[str]:
    """All modules that a file imports anywhere, inside of functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and not node.level, f"{path} imports relatively"
            names.add(node.module)
    return names


def test_imports_run_one_way(repo_root: Path) -> None:
    """Integration on routing and experts, these on the kernels; never back, not lazily either."""
    kernels = sorted((repo_root / "kernels" / "capmoe_kernels").glob("*.py"))
    core = sorted((repo_root / "vllm_capmoe").glob("*.py"))
    assert kernels and core
    for path in (*kernels, *core):
        tops = {name.split(".")[0] for name in imports_of(path)}
        assert "vllm" not in tops, path
        assert "vllm_capmoe" not in tops or path in core, path
    for path in sorted((repo_root / "vllm_capmoe" / "integration").glob("*.py")):
        assert not any(name.startswith("vllm_capmoe.planner") for name in imports_of(path)), path
    for path in core:
        inside = [name for name in imports_of(path) if "vllm_capmoe.integration" in name]
        assert not inside or path.name == "__init__.py", path  # which says where `register` is


@pytest.mark.engine
def test_off_loads_nothing_of_the_execution_path() -> None:
    """What vLLM loads in every process of an engine, until a worker starts with a mode."""
    pytest.importorskip("vllm")
    code = (
        "import sys, vllm_capmoe; vllm_capmoe.register()\n"
        "from vllm.engine.arg_utils import EngineArgs; EngineArgs(model='m')\n"
        "print(*(name for name in sys.modules if name.startswith(('vllm_cap', 'capmoe'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "vllm_capmoe.integration.engine_args" in loaded
    kernels = {name for name in loaded if name.startswith("capmoe_kernels.")}
    assert kernels <= {"capmoe_kernels.capacity", "capmoe_kernels.contract"}
    for part in ("ops", "experts", *(f"integration.{name}" for name in PATH)):
        assert f"vllm_capmoe.{part}" not in loaded
