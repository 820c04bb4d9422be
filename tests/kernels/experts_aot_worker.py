"""Compile the expert kernels ahead of time, without a GPU, with the arguments of real calls.

Run by test_experts_aot.py in a process of its own, since TRITON_INTERPRET=1 (set for the other
tests) makes kernels that can't be compiled. Prints one JSON line per compiled kernel.

    python experts_aot_worker.py '[{"capability": [9, 0], "tokens": 1, ...}, ...]'
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import cubins
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from capmoe_kernels import experts, launch
from capmoe_kernels import seats as seating

NUM_SMS = {8: 108, 9: 132, 10: 148, 12: 170}
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


class AheadOfTime:
    """Stands in for a kernel: a launch compiles it for `capability` and records what came out."""

    def __init__(self, kernel: Any, capability: tuple[int, int], records: list[dict[str, Any]]):
        self.kernel, self.capability, self.records = kernel, capability, records

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.compile(grid, args, kwargs)

    def compile(self, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        options = {
            k: kwargs.pop(k) for k in ("num_warps", "num_stages", "launch_pdl") if k in kwargs
        }
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        for index, param in enumerate(self.kernel.params):
            value = values[param.name]
            if param.is_constexpr or value is None:
                signature[param.name] = "constexpr"
                constants[(index,)] = value
            elif isinstance(value, TensorDescriptor):
                block = ",".join(map(str, value.block_shape))
                signature[param.name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
            elif isinstance(value, torch.Tensor):
                signature[param.name] = "*" + TYPES[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]  # as torch's allocator gives
            else:
                signature[param.name] = "i32" if value < 2**31 else "i64"
        major, minor = self.capability
        compiled = triton.compile(
            ASTSource(self.kernel, signature, constants, attributes),
            target=GPUTarget("cuda", 10 * major + minor, 32),
            options=options,
        )
        self.records.append({"grid": list(grid), **facts(compiled, self.kernel.__name__)})


def stand_in(
    module: Any, names: tuple[str, ...], capability: tuple[int, int]
) -> list[dict[str, Any]]:
    """Put AheadOfTime in the place of the kernels `names`; returns what will hold their records."""
    records: list[dict[str, Any]] = []
    for name in names:
        kernel = getattr(module, name)
        kernel = kernel.kernel if isinstance(kernel, AheadOfTime) else kernel
        setattr(module, name, AheadOfTime(kernel, capability, records))
    return records


def facts(compiled: Any, name: str) -> dict[str, Any]:
    """What the compiler says of a kernel."""
    ptx = compiled.asm["ptx"]
    usage = cubins.resources(compiled.asm["cubin"])
    waits = re.findall(r"warp_group_dot_wait.*?pendings = (\d+)", compiled.asm["ttgir"])
    return {
        "kernel": name,
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "instructions": cubins.count(cubins.instructions(compiled.asm["cubin"]))._asdict(),
        "shared": compiled.metadata.shared,
        "num_warps": compiled.metadata.num_warps,
        "wgmma": sorted(set(re.findall(r"wgmma\.mma_async\S*?\.(m\d+n\d+k\d+)", ptx))),
        "wgmma_in_flight": max(map(int, waits), default=0),
        "tcgen05": ptx.count("tcgen05.mma"),
        "mma": ptx.count("mma.sync"),
        "tma_loads": ptx.count("cp.async.bulk.tensor"),
        "full_divisions": ptx.count("div.full") + ptx.count("div.rn"),
        "additions_of_zero": len(re.findall(r"add\S*\.f32\s[^;]*\b0f0{8}\b", ptx)),
        "pdl": "griddepcontrol.wait" in ptx,
        "async_copies": len(re.findall(r"cp\.async\.c[ag]\.shared", ptx)),
    }


def compile_case(case: dict[str, Any]) -> dict[str, Any]:
    """Launch all three kernels as fused_experts does, on tensors without memory."""
    major, minor = case["capability"]
    chip = launch.Chip((major, minor), NUM_SMS[major])
    tokens, width, num_experts = case["tokens"], case["width"], case["experts"]
    num_hidden, intermediate = case["hidden"], case["intermediate"]
    dtype = getattr(torch, case.get("dtype", "bfloat16"))
    act = experts.resolve_activation(case.get("activation", "silu"))
    config = launch.default_config(
        tokens,
        width,
        num_experts,
        num_hidden,
        intermediate,
        chip=chip,
        itemsize=dtype.itemsize,
    )
    if "config" in case:
        config = launch.ExpertsConfig.from_dict({**config.to_dict(), **case["config"]})

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    wide = 2 * intermediate if act.gated else intermediate
    biased = case.get("bias", False)
    slots = tokens * width
    seats = experts.Seats(
        empty(slots, of=torch.int32),
        empty(num_experts + 1, of=torch.int32),
    )
    weights = empty(tokens, width, of=torch.float32)
    held = case.get("held")  # fewer rows than places
    num_rows = held or slots
    seat_of = empty(slots, of=torch.int32) if held else None
    acts = empty(num_rows, intermediate)
    split = config.down.split_k
    rows = empty(split * num_rows * num_hidden, of=torch.float32 if split > 1 else dtype)
    names = ("gate_up_kernel", "down_kernel", "combine_kernel")
    records = stand_in(experts.kernels, names, (major, minor))
    experts.launch_gate_up(
        empty(tokens, num_hidden),
        empty(num_experts, wide, num_hidden),
        empty(num_experts, wide) if biased else None,
        weights,
        seats,
        acts,
        act,
        config.gate_up,
        chip,
        mul_weight=False,
        bounded=held is not None,
        pdl=config.pdl,
    )
    experts.launch_down(
        acts,
        empty(num_experts, num_hidden, intermediate),
        empty(num_experts, num_hidden) if biased else None,
        weights,
        seats,
        rows,
        config.down,
        chip,
        mul_weight=True,
        seat_of=seat_of,
        pdl=config.pdl,
    )
    experts.launch_combine(
        rows,
        empty(tokens, width, of=torch.int32),
        None,
        empty(tokens, num_hidden),
        config,
        num_rows=num_rows,
        seat_of=seat_of,
        pdl=config.pdl,
    )
    return {"config": config.to_dict(), "kernels": records}


def compile_seats(case: dict[str, Any]) -> dict[str, Any]:
    """Launch both kernels of make_seats, with ids and a map in types as they come."""
    tokens, width, num_experts = case["tokens"], case["width"], case["experts"]
    names = ("count_kernel", "place_kernel")
    records = stand_in(seating.kernels, names, tuple(case["capability"]))
    seating.INTERPRETED = True  # takes tensors of the CPU
    ids = torch.zeros(tokens, width, dtype=getattr(torch, case["ids"]))
    expert_map = torch.zeros(8 * num_experts, dtype=torch.int32) if case["mapped"] else None
    seating.make_seats(ids, num_experts, expert_map)
    return {"kernels": records}


def main() -> None:
    for case in json.loads(sys.argv[1]):
        result = compile_seats(case) if "ids" in case else compile_case(case)
        print(json.dumps({"case": case, **result}), flush=True)


if __name__ == "__main__":
    main()
