"""The built distribution, installed as users do: not editable, in an environment of its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from engines import environment
from overlays import make_overlay

from vllm_capmoe.config import OPTIONS

PACKAGES = {"vllm_capmoe": "vllm_capmoe", "capmoe_kernels": "kernels/capmoe_kernels"}

PROBE = """
import json, importlib.metadata as metadata
import capmoe_kernels, vllm_capmoe
(entry,) = metadata.entry_points(group="vllm.general_plugins", name="capmoe")
found = metadata.distribution("vllm-capmoe")
print(json.dumps({
    "folders": {module.__name__: module.__path__[0] for module in (vllm_capmoe, capmoe_kernels)},
    "register": entry.load() is vllm_capmoe.register,
    "files": sorted(str(file) for file in found.files),
    "requires": found.requires,
    "licence": found.read_text("licenses/LICENSE"),
    "capacity": vllm_capmoe.CapacityConfig(mode="drop").to_dict()["mode"],
}))
"""


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel that was built from the source distribution."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"  # building leaves files behind
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(repo_root, tree, ignore=ignored)
    build = "from setuptools import build_meta; import sys; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, folder, cwd=tree)
    (archive,) = folder.glob("vllm_capmoe-*.tar.gz")
    shutil.unpack_archive(archive, folder / "sources")
    (unpacked,) = (folder / "sources").iterdir()
    build = build.replace("sdist", "wheel")
    run(sys.executable, "-c", build, folder, cwd=unpacked)
    (wheel,) = folder.glob("vllm_capmoe-*.whl")
    python = make_overlay(folder / "venv")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"]
    run(*pip, "--no-deps", "--ignore-installed", wheel, cwd=folder)
    return python


def test_it_holds_all_of_the_packages_and_nothing_else(installed: Path, repo_root: Path) -> None:
    venv = installed.parent.parent
    said = json.loads(run(installed, "-c", PROBE, cwd=venv))
    for name, folder in said["folders"].items():
        assert Path(folder).is_relative_to(venv) and Path(folder).name == name
    assert said["register"] and said["capacity"] == "drop"
    expected = {
        f"{name}/{path.relative_to(repo_root / folder)}"
        for name, folder in PACKAGES.items()
        for pattern in ("**/*.py", "configs/*.json")
        for path in (repo_root / folder).glob(pattern)
    }
    files = {file for file in said["files"] if not file.endswith(".pyc")}
    assert {file for file in files if ".dist-info/" not in file} == expected | {
        "../../../bin/vllm-capmoe"
    }
    command = installed.with_name("vllm-capmoe")
    done = subprocess.run(
        [command, "plan", "--help"], cwd=venv, capture_output=True, text=True, check=True
    )
    assert "--max-loss" in done.stdout
    assert "Apache License" in said["licence"]
    # A requirement of vLLM or torch would put other builds over those that are there.
    assert all("extra ==" in line for line in said["requires"])


@pytest.mark.engine
def test_vllm_finds_it_there(installed: Path) -> None:
    text = run(
        installed.with_name("vllm"), "serve", "--help=MoECapacityConfig", cwd=installed.parent
    )
    for option in OPTIONS:
        assert option.flag in text
