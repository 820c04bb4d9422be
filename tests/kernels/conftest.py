"""The kernels' tests run on a GPU where there is one, and under Triton's interpreter elsewhere.

Triton decides when it is imported whether its kernels are compiled or interpreted, its own library
of them included. So it is imported here, with TRITON_INTERPRET=1 for as long as that takes and
while a test of this folder runs. Tests of other folders and the processes they start don't see it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

INTERPRET = not torch.cuda.is_available()

if INTERPRET:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "triton was imported, to compile its kernels, before the tests in tests/kernels were "
            "collected: run these first, or in a process of their own."
        )
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    import capmoe_kernels.experts
    import capmoe_kernels.routing  # noqa: F401

    if before is None:
        del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TRITON_INTERPRET=1 during the test, which some of Triton's functions ask for when called."""
    if INTERPRET:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield
