"""Faults for the dry run: what a kernel may do on first contact, done by the down product's.

A fault is KIND@ITEM, with KIND one of

    raise   the launch raises
    hang    it never returns
    kill    its process is killed in the middle
    wrong   it multiplies one row of one expert's output by 1.2
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

KINDS = ("raise", "hang", "kill", "wrong")


def parse(texts: list[str]) -> dict[str, str]:
    """Item -> kind. Raises ValueError for another kind."""
    found = {}
    for text in texts:
        kind, _, item = text.partition("@")
        if kind not in KINDS or not item:
            raise ValueError(f"fault is {text!r}, but KIND@ITEM with one of {KINDS} is accepted.")
        found[item] = kind
    return found


class _Faulty:
    """In the place of the kernel `real`."""

    def __init__(self, real: Any, kind: str) -> None:
        self.real, self.kind = real, kind

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            if self.kind == "raise":
                raise RuntimeError("fault: the kernel raises")
            while self.kind == "hang":
                time.sleep(60)
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            self.real[grid](*args, **options)
            args[6].view(-1)[: options["H"]] *= 1.2  # its output, the first row

        return launch


@contextlib.contextmanager
def injected(kind: str | None) -> Iterator[None]:
    """While an item runs; None: no fault."""
    if kind is None:
        yield
        return
    from capmoe_kernels import _gemm_kernels as kernels

    real = kernels.down_kernel
    kernels.down_kernel = _Faulty(real, kind)
    try:
        yield
    finally:
        kernels.down_kernel = real
