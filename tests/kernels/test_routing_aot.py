"""The routing kernels compile for Ampere, Hopper and Blackwell, within the chip and without spills.

No GPU is needed: Triton's compiler and its assembler run without one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from compiled_tables import ARCH, fits, routing_table, run

# Bytes that one program may use (CUDA programming guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=() if arch == 90 else pytest.mark.slow)
        for arch in sorted(SHARED_LIMIT)
    ],
)
def test_kernels_compile_within_the_chip(arch: int, tmp_path: Path) -> None:
    threads = {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    lines = run("routing_aot_worker.py", str(arch), **threads)
    if arch == ARCH:
        table = routing_table(lines)
        assert fits(table), f"docs/compiled_kernels.md is stale:\n{table}"
    launches: dict[str, list[str]] = {}
    for line in lines:
        launches.setdefault(line["case"], []).append(line["kernel"])
        assert line["stack"] == 0 and line["local"] == 0, f"spilled registers: {line}"
        assert line["shared"] <= SHARED_LIMIT[arch], line
        assert line["registers"] * 32 * line["warps"] <= 65536, line
        assert line["float_atomics"] == 0, line
        if line["kernel"] == "pack_kernel":
            # Weights have the reference's bits: IEEE division, no product merged into a sum.
            assert set(line["divisions"]) == {"div.rn.f32"} and line["float_fma"] == 0, line
    five = ["choose_kernel", "share_kernel", "limit_kernel", "pack_kernel", "seats_kernel"]
    four = [name for name in five if name != "share_kernel"]
    six = [*four[:2], "reroute_kernel", "give_kernel", *four[2:]]
    assert launches.pop("mixtral-off") == [name for name in four if name != "limit_kernel"]
    assert launches.pop("keep-olmoe") == [name for name in five if name != "limit_kernel"]
    assert launches.pop("keep-reroute") == [six[0], "share_kernel", *six[1:]]
    for case in ("keep-deepseek", "keep-device", "keep-largest"):
        assert launches.pop(case) == five
    assert len(launches) == 12
    for case, names in launches.items():
        assert names == (six if "reroute" in case else four)
