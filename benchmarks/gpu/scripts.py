"""The steps that are scripts of their own: capacities, tuning, the engine, the memory checker.

Each keeps its own table, which it continues; what it writes goes to one folder, packed after every
step. A script that prints nothing for SILENCE seconds is ended and started again, for as long as
its time lasts: by then its table says what was begun, and what was begun twice is left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from gpu.processes import end_group, started

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parent
SILENCE = 150.0
CHECKED = (  # what the memory checker runs
    "test_routing.py::test_random_cases_with_the_shipped_launch[0]",
    "test_routing.py::test_sizes[130-60-4-config5]",
    "test_routing.py::test_views_of_larger_tensors[shipped-dtype1]",
    "test_routing.py::test_ids_out_of_range_stay_inside[shipped]",
    "test_experts.py::test_dtypes[True-descriptors-dtype0]",
    "test_experts.py::test_odd_sizes[pointers-7-3-4-33-17]",
    "test_experts.py::test_lopsided_routing[one-row-swapped]",
    "test_experts.py::test_configuration_by_heuristics",
    "test_seats.py::test_random_cases[shipped-0]",
)


@dataclass(frozen=True)
class Script:
    """A step: its command, and its weight in the time that is left."""

    arguments: tuple[str, ...]
    weight: int
    vllm: bool = False  # whether it needs vLLM


SCRIPTS = {
    "capacity": Script(("bench_moe_layer.py", "--skews", "3", "1"), 120),
    "tune": Script(("tune_experts.py",), 120),
    "tuned": Script(("bench_moe_layer.py", "--label", "tuned", "--modes", "off"), 40),
    "engine": Script(("bench_engine.py", "--layers", "8"), 150, True),
    "decode": Script(
        ("bench_decode.py", "--model", "olmoe", "--layers", "8", "--compiled"), 150, True
    ),
    "ep": Script(
        ("emulate_ep.py", "--shapes", "mixtral-8x7b", "olmoe", "deepseek-v2-lite", "qwen1.5-moe"),
        60,
    ),
    "tiles": Script(
        ("bench_moe_layer.py", "--round-capacity", "--tokens", "1024", "4096", "8192"), 20
    ),
    "sanitize": Script((), 60),
}


def command(step: str, dry: bool, seconds: float) -> list[str] | None:
    """None: the step can't be run here."""
    if step == "sanitize":
        places = os.environ.get("PATH", "") + ":/usr/local/cuda/bin"
        checker = shutil.which("compute-sanitizer", path=places)
        if checker is None or dry:
            return None
        tests = [str(ROOT / "tests" / "kernels" / name) for name in CHECKED]
        pytest = ["-m", "pytest", "-c", "/dev/null", "--rootdir", str(ROOT), "-q"]
        options = ["--tool", "memcheck", "--target-processes", "application-only"]
        last = ["--import-mode=importlib", "-p", "no:cacheprovider", *tests]
        return [checker, *options, "--error-exitcode", "9", sys.executable, *pytest, *last]
    script, *options = SCRIPTS[step].arguments
    if dry:
        options += ["--quick"] + ["--interpret"] * (step not in ("engine", "decode"))
    budget = ["--budget", str(int(seconds))]
    return [sys.executable, str(BENCHMARKS / script), *options, *budget]


class Scripts:
    """The folder that the scripts of one card write to, kept packed in the results."""

    def __init__(self, folder: Path, slug: str, scratch: Path) -> None:
        self.packed, self.scratch = folder / f"{slug}-scripts.tgz", scratch
        if self.packed.exists():
            with tarfile.open(self.packed) as archive:
                archive.extractall(scratch, filter="data")

    def pack(self) -> None:
        part = self.packed.with_suffix(".part")
        with tarfile.open(part, "w:gz") as archive:
            archive.add(self.scratch, ".")
        part.replace(self.packed)

    def run(self, step: str, seconds: float, env: dict[str, str], dry: bool) -> str:
        """What came of it, in words."""
        end = time.monotonic() + seconds
        log = self.scratch / f"{step}.log"
        more = {"OUT": str(self.scratch), "BENCH_DATE": self.date()}
        if step == "tuned":
            more["CAPMOE_TUNED_CONFIG_FOLDER"] = str(self.scratch / "configs")
        if step == "sanitize":
            more["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        result = "no time left"
        while (left := end - time.monotonic()) > 5:
            words = command(step, dry, left - 5)
            if words is None:
                return "left out: not on this host"
            with log.open("a") as output:
                code = watched(words, env | more, output, log, left)
            self.pack()
            if code is not None:
                return "done" if code == 0 else f"exit status {code}, see {log.name}"
            result = "ended after its time, or a long silence; what it wrote stays"
        return result

    def goals(self, step: str) -> list[str]:
        """What the last run of a script said of its goals."""
        log = self.scratch / f"{step}.log"
        lines = log.read_text().splitlines() if log.exists() else []
        judged = [line for line in lines if line.split(" ")[0] in ("PASS", "FAIL", "WAITS")]
        return list({line.partition(": ")[0]: line for line in judged}.values())

    def date(self) -> str:
        """That of the first table, so that its name stays the same."""
        names = sorted(path.name[:10] for path in self.scratch.glob("????-??-??-*.csv"))
        return names[0] if names else time.strftime("%Y-%m-%d", time.gmtime())


def watched(
    words: list[str], env: dict[str, str], output: object, log: Path, seconds: float
) -> int | None:
    """The exit status; None where the time was up or nothing was printed for SILENCE seconds."""
    process = started(words, env=env, stdout=output, stderr=subprocess.STDOUT)
    end = time.monotonic() + seconds
    try:
        while (now := time.monotonic()) < end:
            try:
                return process.wait(1)
            except subprocess.TimeoutExpired:
                quiet = time.time() - log.stat().st_mtime
                if quiet > SILENCE and now > end - seconds + SILENCE:
                    return None
        return None
    finally:
        end_group(process)
