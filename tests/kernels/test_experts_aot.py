"""The expert kernels as the compiler makes them for Ampere, Hopper and Blackwell; needs no GPU.

What the heuristics launch must hold on to the fast instructions of each chip, keep its accumulators
in registers, and fit as many programs on a multiprocessor as the persistent grid counts on.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from compiled_tables import CHIPS, MIXTRAL, MIXTRAL_TOKENS, experts_table, fits, run
from cubins import BIN

from capmoe_kernels.launch import Chip

REGISTERS_PER_SM = 65536  # 32-bit registers, compute capability 8.0 to 10.0

pytestmark = [
    pytest.mark.skipif(
        not (BIN / "cuobjdump").exists(), reason="this Triton comes without NVIDIA's tools"
    ),
    pytest.mark.timeout(1800),  # the first test waits for all that the others look at
]

# Fine experts (Qwen3-30B-A3B) beside the coarse ones of Mixtral, and odd ones.
QWEN = {"width": 8, "experts": 128, "hidden": 2048, "intermediate": 768}
GPT_OSS = {"width": 4, "experts": 32, "hidden": 2880, "intermediate": 2880}
BIASED = {"activation": "swigluoai", "bias": True}


def _case(capability: tuple[int, int], tokens: int, shape: dict[str, int], **more: Any) -> Any:
    case = {"capability": list(capability), "tokens": tokens, **shape, **more}
    words = [f"sm_{capability[0]}{capability[1]}", f"T{tokens}", f"E{shape['experts']}"]
    words += [f"H{shape['hidden']}", *(str(v) for v in more.values())]
    return pytest.param(case, id="-".join(words))


CASES = [
    *(
        _case(capability, tokens, shape)
        for capability in CHIPS
        for shape, all_tokens in ((MIXTRAL, MIXTRAL_TOKENS), (QWEN, (16, 8192)))
        for tokens in all_tokens
    ),
    _case((9, 0), 4, GPT_OSS, **BIASED),
    _case((9, 0), 8192, GPT_OSS, **BIASED),
    _case((9, 0), 8192, QWEN, dtype="float16", activation="relu2_no_mul"),
    *(
        _case(capability, tokens, QWEN, dtype=dtype)
        for capability in ((9, 0), (10, 0), (8, 0))
        for tokens, dtype in ((1, "float32"), (8192, "float32"), (8192, "float16"))
    ),
    _case((9, 0), 16, QWEN, config={"PDL": True}),
    # One of two ranks, with local candidates: wide rows, of which few places are held here.
    *(
        _case(capability, 8192, {**QWEN, "width": 72, "experts": 64}, held=131072)
        for capability in ((9, 0), (10, 0), (8, 0))
    ),
    # Rows that are no multiple of 16 bytes: no descriptors.
    _case((9, 0), 8192, {**QWEN, "hidden": 2050, "intermediate": 770}),
]

# Seats: one expert here, few, as many as one program takes, several programs.
SEATS = [
    {"capability": list(capability), "tokens": 65536, "width": 8, "experts": experts, **types}
    for capability in ((9, 0), (10, 0), (8, 0))
    for experts in (1, 8, 16, 64, 300)
    for types in (
        {"ids": "int32", "mapped": True},
        {"ids": "int64", "mapped": True},
        {"ids": "int64", "mapped": False},
    )
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the worker says of each case, by the case as JSON."""
    cases = [*(param.values[0] for param in CASES), *SEATS]
    cache = str(tmp_path_factory.mktemp("triton"))
    lines = run("experts_aot_worker.py", json.dumps(cases), TRITON_CACHE_DIR=cache)
    return {json.dumps(line["case"]): line for line in lines}


@pytest.mark.parametrize("case", CASES)
def test_compiled(case: dict[str, Any], compiled: dict[str, Any]) -> None:
    result = compiled[json.dumps(case)]
    capability = tuple(case["capability"])
    limit = Chip(capability, 1).shared_limit
    config = result["config"]
    sixteen_bit = case.get("dtype") != "float32"
    aligned = case["hidden"] % 8 == 0 and case["intermediate"] % 8 == 0
    assert [k["kernel"] for k in result["kernels"]] == [
        "gate_up_kernel",
        "down_kernel",
        "combine_kernel",
    ]
    for kernel in result["kernels"]:
        assert kernel["pdl"] == config["PDL"]
        assert (kernel["stack"], kernel["local"]) == (0, 0), "spilled registers"
        if kernel["kernel"] == "combine_kernel":
            assert kernel["shared"] == 0
            continue
        launch = {**config, **(config["down"] if kernel["kernel"] == "down_kernel" else {})}
        programs = launch["PROGRAMS_PER_SM"]
        # 1 KiB of each program and multiprocessor is the system's; registers go by 8 per thread.
        assert programs * (kernel["shared"] + 1024) <= limit + 1024
        per_thread = -(-kernel["registers"] // 8) * 8
        assert programs * per_thread * 32 * kernel["num_warps"] <= REGISTERS_PER_SM

        if kernel["kernel"] == "gate_up_kernel":
            assert kernel["async_copies"] > 0, "activations are gathered by asynchronous copies"
        if capability == (8, 0):
            assert (kernel["mma"] > 0) == sixteen_bit and kernel["async_copies"] > 0
            continue
        assert (kernel["tma_loads"] > 0) == (aligned and sixteen_bit)
        if not sixteen_bit:
            continue
        assert kernel["mma"] == 0, "an older chip's matrix instruction"
        if capability == (9, 0):
            assert kernel["wgmma"]
            assert kernel["wgmma_in_flight"] > 0, "each matrix instruction waits for the one before"
        else:
            assert kernel["tcgen05"] > 0


def test_the_document_has_what_was_compiled(compiled: dict[str, Any]) -> None:
    table = experts_table(compiled)
    assert fits(table), f"docs/compiled_kernels.md is stale:\n{table}"


@pytest.mark.parametrize("shape", [MIXTRAL, QWEN])
def test_gate_and_up_share_one_instruction(shape: dict[str, int], compiled: dict[str, Any]) -> None:
    case = _case((9, 0), 8192, shape).values[0]
    gate_up = compiled[json.dumps(case)]["kernels"][0]
    assert gate_up["wgmma"] == ["m64n256k16"]


def test_epilogue_of_swiglu_is_short(compiled: dict[str, Any]) -> None:
    """No division with range checks, no addition of a beta of zero; registers are left over.

    Half of the instructions between two tiles' loops were these; 255 registers, all there are.
    """
    for shape in (MIXTRAL, QWEN):
        gate_up = compiled[json.dumps(_case((9, 0), 8192, shape).values[0])]["kernels"][0]
        assert gate_up["full_divisions"] == gate_up["additions_of_zero"] == 0
    ai = compiled[json.dumps(_case((9, 0), 4, GPT_OSS, **BIASED).values[0])]["kernels"][0]
    assert ai["full_divisions"] == 0


def test_flatten_loads_ahead_of_the_epilogue(compiled: dict[str, Any]) -> None:
    """One more tile of weights is in shared memory than the loop's stages hold."""
    case = _case((9, 0), 8192, MIXTRAL).values[0]
    for kernel in compiled[json.dumps(case)]["kernels"][:2]:
        assert kernel["shared"] > 4 * (128 + 256) * 64 * 2 + 1024


@pytest.mark.parametrize("case", SEATS, ids=lambda case: "-".join(map(str, case.values())))
def test_seats_compiled(case: dict[str, Any], compiled: dict[str, Any]) -> None:
    kernels = compiled[json.dumps(case)]["kernels"]
    assert [k["kernel"] for k in kernels] == ["count_kernel", "place_kernel"]
    for kernel in kernels:
        assert (kernel["stack"], kernel["local"]) == (0, 0), "spilled registers"
        # Four programs at least on a multiprocessor: they hide each other's waits.
        assert 4 * kernel["registers"] * 32 * kernel["num_warps"] <= REGISTERS_PER_SM
        assert kernel["shared"] <= 4096
