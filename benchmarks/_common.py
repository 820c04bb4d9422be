"""What the scripts share when they run: arguments, the device, time, errors.

Importing this needs the standard library only; torch is imported when used, since Triton decides at
its import whether kernels are interpreted (`setup`).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _shapes import SHAPES
from _tables import device_slug, output_folder, today

if TYPE_CHECKING:
    import torch


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
