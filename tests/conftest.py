"""What every test may use: the example script as a module, one example checkpoint, GPU skipping.

Where there is no GPU, the tests of the kernels run under Triton's interpreter. Triton decides when
it is imported whether its kernels are compiled or interpreted, its own library of them included. So
it is imported here, before any test is, with TRITON_INTERPRET=1 for as long as that takes. Tests
and the processes they start don't see it, but for those of tests/kernels.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from clusters import cores
from engines import ended
from forks import Forks

ROOT = Path(__file__).resolve().parent.parent

if not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.language  # noqa: F401

        import capmoe_kernels.experts
        import capmoe_kernels.routing  # noqa: F401

# Requests to servers of the tests must not go through a proxy.
for name in ("no_proxy", "NO_PROXY"):
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost"]))


# One of several processes of `pytest -n`: its engines begin with a core of their own.
WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores(1)
    torch.set_num_threads(1)


def load_script(name: str, path: Path) -> ModuleType:
    """Import a file that belongs to no package, under `name`."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} can't be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The folder that holds pyproject.toml."""
    return ROOT


@pytest.fixture(scope="session")
def make_mixtral() -> ModuleType:
    """examples/make_mixtral.py as a module."""
    return load_script("make_mixtral", ROOT / "examples" / "make_mixtral.py")


@pytest.fixture(scope="session")
def example_model(make_mixtral: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example checkpoint with its default options. Read only: all tests share it."""
    return make_mixtral.make_checkpoint(tmp_path_factory.mktemp("models") / "mixtral")


@pytest.fixture(scope="session")
def make_carved() -> Iterator[ModuleType]:
    """examples/make_carved.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield importlib.import_module("make_carved")


@pytest.fixture(scope="session")
def padded_carved_model(make_carved: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The language model of the demo, with heads that divide between two ranks. Read only."""
    return make_carved.make_carved(tmp_path_factory.mktemp("models") / "padded", padded=True)


RunScript = Callable[[Path, list[str], Path, dict[str, str]], str]


@pytest.fixture(scope="session")
def run_script() -> Iterator[RunScript]:
    """Run a script that uses vLLM: run_script(script, arguments, log, environment) -> its output.

    It fails where the script does, takes too long or leaves a process behind.
    """
    kept: dict[str, Forks] = {}  # the last used at the end

    def run(script: Path, arguments: list[str], log: Path, env: dict[str, str]) -> str:
        env.pop("PYTEST_CURRENT_TEST", None)  # is another one each time
        key = json.dumps(env, sort_keys=True)
        forks = kept[key] = kept.pop(key, None) or Forks(env)
        if len(kept) > 3:  # each holds half a gigabyte
            kept.pop(next(iter(kept))).close()
        group, code = forks.run(script, arguments, log, 550)
        return ended(group, "no end in 550 s" if code is None else code, log)

    yield run
    for forks in kept.values():
        forks.close()


# Files that take minutes, the longest first: `pytest -n` begins with them, so that no long one is
# left for the end.
LONG = [
    "e2e/test_engine.py",
    "ranks/test_without_limit.py",
    "ranks/test_server.py",
    "ranks/test_limits.py",
    "ranks/test_live.py",
    "e2e/test_live.py",
    "e2e/test_models.py",
    "ranks/test_ray_examples.py",
    "kernels/test_experts_aot.py",
    "kernels/test_routing_aot.py",
    "ranks/test_triton.py",
    "ranks/test_carved.py",
    "ranks/test_pipeline.py",
    "e2e/test_server.py",
    "e2e/test_live_server.py",
    "e2e/test_new_weights.py",
    "planner/test_plan.py",
    "plugin/test_refusals.py",
    "plugin/test_wheel.py",
    "plugin/test_compile_cache.py",
    "plugin/test_engine_args.py",
    "plugin/test_proof.py",
    "kernels/test_bounds.py",
    "kernels/test_experts.py",
    "kernels/test_routing.py",
    "kernels/test_tables.py",
]


def file_of(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT / "tests").as_posix()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is no CUDA device, and tests marked cpu where there is."""
    has_gpu = torch.cuda.is_available()
    reason = "needs vLLM's CPU build" if has_gpu else "needs a CUDA device"
    for item in items:
        if item.get_closest_marker("cpu" if has_gpu else "gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
    if WORKER:
        items.sort(key=lambda item: LONG.index(file) if (file := file_of(item)) in LONG else 99)


seconds_by_folder: Counter[str] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    seconds_by_folder[Path(report.location[0]).parent.name] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what each folder took."""
    took = ", ".join(f"{name} {s:.0f} s" for name, s in sorted(seconds_by_folder.items()))
    terminalreporter.write_line(f"by folder: {took}")
