"""What importing our packages loads, each in an interpreter of its own, and who imports whom."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
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


# Layer by layer: a module imports those of its own layer and of the layers above it in this list.
LAYERS = (
    ("capmoe_kernels",),
    ("vllm_capmoe.version", "vllm_capmoe.layer_settings", "vllm_capmoe.config", "vllm_capmoe.plan"),
    ("vllm_capmoe.live", "vllm_capmoe.drawing"),
    ("vllm_capmoe.limits", "vllm_capmoe.ranking", "vllm_capmoe.sharing"),
    ("vllm_capmoe.torch_routing", "vllm_capmoe.experts", "vllm_capmoe.reference"),
    ("vllm_capmoe.unlimited", "vllm_capmoe.ops"),
    ("vllm_capmoe.integration",),
    ("vllm_capmoe.planner", "vllm_capmoe.control"),
    ("vllm_capmoe.__main__",),
    ("vllm_capmoe",),  # the package itself: a door to the public names, for all outside of it
    ("examples",),
    ("benchmarks",),
)
# Scripts find these folders on their path, and in them modules by their bare names.
SCRIPTS = ("examples", "benchmarks", "benchmarks/quality")


def modules(root: Path) -> dict[str, Path]:
    """All modules of the packages and of the folders of scripts, by their names from the root."""
    found = {}
    for base, folder in (
        ("kernels", "capmoe_kernels"),
        ("", "vllm_capmoe"),
        ("", "examples"),
        ("", "benchmarks"),
    ):
        for path in sorted((root / base / folder).rglob("*.py")):
            parts = path.relative_to(root / base).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports_of(path: Path) -> Iterator[tuple[str, str | None]]:
    """What a file imports anywhere, in functions and for types too: module, name (or None)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and not node.level, f"{path} imports relatively"
            yield from ((node.module, alias.name) for alias in node.names)


def graph(found: dict[str, Path]) -> dict[str, set[str]]:
    """Who imports whom of these modules. A name that is a module is that module."""
    edges = {}
    for module, path in found.items():
        bases = [""]
        if module.startswith(("examples", "benchmarks")):
            bases += [folder.replace("/", ".") + "." for folder in reversed(SCRIPTS)]
        edges[module] = {
            next(
                (each for base in bases for each in (base + full, base + name) if each in found), ""
            )
            for name, attribute in imports_of(path)
            for full in [f"{name}.{attribute}"]
        } - {""}
    return edges


def layer_of(module: str) -> int:
    """The place in `LAYERS`, by the longest name there that the module or its package has."""
    names = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    parts = module.split(".")
    found = [".".join(parts[:size]) for size in range(len(parts), 0, -1)]
    known = [name for name in found if name in names and (name != "vllm_capmoe" or name == module)]
    assert known, f"{module} is in no layer of LAYERS"
    return names[known[0]]


def test_imports_run_one_way(repo_root: Path) -> None:
    """No circle and no way back: not in a function, not for types, not between folders."""
    found = modules(repo_root)
    edges = graph(found)
    assert len(edges) > 80 and sum(map(len, edges.values())) > 150
    graphlib.TopologicalSorter(edges).prepare()  # CycleError names the circle
    back = [
        f"{module} imports {other}"
        for module, others in edges.items()
        for other in others
        if layer_of(other) > layer_of(module)
    ]
    assert not back, "\n".join(back)
    for module, path in found.items():
        if module.startswith("capmoe_kernels") or layer_of(module) < layer_of(
            "vllm_capmoe.integration"
        ):
            tops = {name.split(".")[0] for name, _ in imports_of(path)}
            assert "vllm" not in tops, f"{module} imports vllm"


@pytest.mark.parametrize(
    ("module", "line", "circle"),
    [
        ("vllm_capmoe.ranking", "import vllm_capmoe.sharing", ["vllm_capmoe.sharing"]),
        (
            "vllm_capmoe.integration.stats",
            "from vllm_capmoe.integration import metrics",
            ["vllm_capmoe.integration.metrics"],
        ),
        ("benchmarks._opponents", "import bench_moe_layer", ["benchmarks.bench_moe_layer"]),
        ("benchmarks.gpu.items", "from gpu import report", ["benchmarks.gpu.report"]),
    ],
)
def test_a_circle_is_seen(
    repo_root: Path, tmp_path: Path, module: str, line: str, circle: list[str]
) -> None:
    """One import more, hidden in a function."""
    found = modules(repo_root)
    changed = tmp_path / "changed.py"
    changed.write_text(f"{found[module].read_text()}\n\ndef hidden():\n    {line}\n")
    with pytest.raises(graphlib.CycleError) as error:
        graphlib.TopologicalSorter(graph({**found, module: changed})).prepare()
    assert {module, *circle} <= set(error.value.args[1])


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
