"""What every test may use: the example script as a module, one example checkpoint, GPU skipping."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Requests to servers of the tests must not go through a proxy.
for name in ("no_proxy", "NO_PROXY"):
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost"]))


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is no CUDA device, and tests marked cpu where there is."""
    import torch

    has_gpu = torch.cuda.is_available()
    reason = "needs vLLM's CPU build" if has_gpu else "needs a CUDA device"
    for item in items:
        if item.get_closest_marker("cpu" if has_gpu else "gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
