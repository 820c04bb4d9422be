"""Compile the routing kernels ahead of time, without a GPU, with the arguments of real calls.

Run by test_routing_aot.py in a process of its own, since TRITON_INTERPRET=1 (set for the other
tests) makes kernels that can't be compiled. Prints one JSON line per case and kernel.

    python routing_aot_worker.py 90
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from typing import Any

import cubins
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from capmoe_kernels import (
    _routing_kernels,
    _routing_limits,
    _routing_reroute,
    _routing_sharing,
    routing,
)
from vllm_capmoe import CapacityConfig
from vllm_capmoe.plan import resolve

MODULES = {
    "choose_kernel": _routing_kernels,
    "share_kernel": _routing_sharing,
    "limit_kernel": _routing_limits,
    "reroute_kernel": _routing_reroute,
    "give_kernel": _routing_reroute,
    "pack_kernel": _routing_kernels,
    "seats_kernel": _routing_kernels,
}
OPTIONS = ("num_warps", "maxnreg")
TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. tensors: the optional ones that a real call in vLLM would have."""

    T: int
    E: int
    k: int
    config: dict[str, Any]
    tensors: tuple[str, ...] = ()
    devices: int = 1
    requests: int = 1
    scoring: str | None = None
    dtype: torch.dtype = torch.float32


MASKS = ("is_padding_T", "is_decode_T")
DROP, EXPANDED, REROUTE = ({"mode": mode} for mode in ("drop", "expanded", "reroute"))
KEEP = {"mode": "off", "decode_keep": "auto"}
CASES = {
    # Mixtral, OLMoE, Qwen3-30B-A3B, DeepSeek-V2-Lite on 8 ranks, and the largest sizes.
    "mixtral-drop": Case(8192, 8, 2, DROP, (*MASKS, "topk_TK")),
    "mixtral-off": Case(1, 8, 2, {"mode": "off"}, scoring="softmax", dtype=torch.bfloat16),
    "olmoe-order": Case(
        256, 64, 8, {**EXPANDED, "metric": "order"}, (*MASKS, "topk_TK", "is_image_T")
    ),
    "qwen3-request": Case(
        8192,
        128,
        8,
        {**EXPANDED, "scope": "request", "priority": "image-first"},
        (*MASKS, "topk_TK", "is_image_T", "request_T"),
        requests=256,
    ),
    "deepseek-local": Case(
        2048, 64, 6, EXPANDED, (*MASKS, "topk_TK", "device_E", "token_device_T"), devices=8
    ),
    "deepseek-device": Case(
        8192,
        64,
        6,
        {**EXPANDED, "level": "device"},
        (*MASKS, "topk_TK", "device_E", "token_device_T"),
        devices=8,
    ),
    "qwen3-reroute": Case(
        8192,
        128,
        8,
        {**REROUTE, "scope": "request"},
        (*MASKS, "topk_TK", "request_T"),
        requests=256,
    ),
    "deepseek-reroute": Case(
        8192,
        64,
        6,
        {**REROUTE, "level": "device", "metric": "random"},
        (*MASKS, "topk_TK", "device_E", "token_device_T"),
        devices=8,
    ),
    "largest-reroute": Case(65536, 512, 16, {**REROUTE, "metric": "order"}, MASKS),
    "largest-random": Case(
        65536, 512, 16, {**EXPANDED, "metric": "random", "max_experts": "none"}, MASKS
    ),
    "sigmoid": Case(4096, 160, 6, EXPANDED, MASKS, scoring="sigmoid", dtype=torch.bfloat16),
    "deepseek-v3": Case(8192, 256, 8, EXPANDED, (*MASKS, "topk_TK"), scoring="sigmoid"),
    "sqrtsoftplus": Case(64, 256, 8, DROP, MASKS, scoring="sqrtsoftplus"),
    "keep-olmoe": Case(16, 64, 8, KEEP, MASKS, scoring="softmax", dtype=torch.bfloat16),
    "keep-deepseek": Case(512, 256, 8, {**KEEP, **DROP}, (*MASKS, "topk_TK"), scoring="sigmoid"),
    "keep-device": Case(
        256,
        64,
        6,
        {**EXPANDED, "level": "device", "decode_keep": 3},
        (*MASKS, "topk_TK", "device_E", "token_device_T"),
        devices=8,
    ),
    "keep-reroute": Case(
        256,
        64,
        6,
        {**REROUTE, "level": "device", "decode_keep": 3},
        (*MASKS, "device_E"),
        devices=8,
    ),
    "keep-largest": Case(4096, 512, 16, {**EXPANDED, "decode_keep": 3}, MASKS, scoring="softmax"),
}


class Recorder:
    """Stands in for a kernel: keeps the arguments of a launch."""

    def __init__(self, name: str, calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]]):
        self.name, self.calls = name, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.calls.append((self.name, args, kwargs))


def record(case: Case) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """The launches of a call."""
    T, E, k = case.T, case.E, case.k
    plan = resolve(
        CapacityConfig(**case.config),
        num_experts=E,
        top_k=k,
        expert_device=[e * case.devices // E for e in range(E)] if case.devices > 1 else None,
        has_token_device="token_device_T" in case.tensors,
        renormalize=True,
    )
    shapes = {"topk_TK": ((T, k), torch.int32), "device_E": ((E,), torch.int64)}
    tensors: dict[str, Any] = {}
    for name in case.tensors:
        dtype = torch.bool if name.startswith("is_") else torch.int64
        shape, dtype = shapes.get(name, ((T,), dtype))
        tensors[name] = torch.zeros(shape, dtype=dtype)
    tensors["counters"] = torch.zeros(2 * E + len(routing.TOTALS), dtype=torch.int64)
    scores = torch.zeros(T, E, dtype=case.dtype)
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    kernels = {name: getattr(module, name) for name, module in MODULES.items()}
    for name, module in MODULES.items():
        setattr(module, name, Recorder(name, calls))
    routing.INTERPRETED = True  # takes tensors of the CPU
    try:
        if case.scoring is None:
            routing.route_triton(scores, plan, num_requests=case.requests, **tensors)
        else:
            routing.route_triton(scores, plan, scoring=case.scoring, **tensors)
    finally:
        for name, module in MODULES.items():
            setattr(module, name, kernels[name])
    return calls


def source(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ASTSource, dict[str, int]]:
    """What Triton would compile for this launch: types, constants, divisibility by 16."""
    kernel = getattr(MODULES[name], name)
    options = {key: value for key, value in kwargs.items() if key in OPTIONS}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, param in enumerate(kernel.params):
        value = values[param.name]
        special = isinstance(value, int) and not param.do_not_specialize
        if param.is_constexpr or value is None or (special and value == 1):
            signature[param.name] = "constexpr"
            constants[param.name] = value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = f"*{TYPES[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "i32"
            if special and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def main(arch: int) -> None:
    for label, case in CASES.items():
        for name, args, kwargs in record(case):
            kernel_source, options = source(name, args, kwargs)
            compiled = triton.compile(
                kernel_source, target=GPUTarget("cuda", arch, 32), options=options
            )
            usage = cubins.resources(compiled.asm["cubin"])
            ptx = compiled.asm["ptx"]
            line = {
                "case": label,
                "T": case.T,
                "E": case.E,
                "k": case.k,
                "kernel": name,
                "warps": options["num_warps"],
                "registers": usage["REG"],
                "stack": usage["STACK"],
                "local": usage["LOCAL"],
                "shared": compiled.metadata.shared,
                "instructions": len(cubins.instructions(compiled.asm["cubin"])),
                "float_atomics": len(re.findall(r"\b(?:atom|red)\.[\w.]*\.(?:f|bf)\d", ptx)),
                "float_fma": len(re.findall(r"\bfma\.rn", ptx)),
                "divisions": re.findall(r"\bdiv\.[\w.]+", ptx),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
