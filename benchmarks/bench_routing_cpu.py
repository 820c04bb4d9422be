"""Host time of a layer's routing on the CPU: vLLM's router, and decode keep around it.

    python benchmarks/bench_routing_cpu.py

A step of decode tokens through `select_experts`, as a layer calls it, on one core. `stock` is
vLLM's own router; `k0` keeps so many of a token's experts; where that is all of them, it is what
our routing costs without changing anything. Gate: who holds what is as `route_torch` has it.
Contenders take turns, call by call; microseconds are medians.
"""

from __future__ import annotations

import statistics
import sys
import time

import _common as common
import _tables

COLUMNS = ("tokens", "experts", "top_k", "contender", "microseconds", "over_stock", "more")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
EXPERTS, TOP_K = 64, 8


def main() -> None:
    args = common.parser(__doc__, shapes=False).parse_args()
    import torch
    from vllm.forward_context import ForwardContext, override_forward_context
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    from vllm_capmoe import CapacityConfig
    from vllm_capmoe.integration.router import CapacityRouter
    from vllm_capmoe.integration.stats import LayerStats
    from vllm_capmoe.integration.step import StepTokens
    from vllm_capmoe.plan import resolve
    from vllm_capmoe.torch_routing import route_torch

    torch.set_num_threads(1)
    out = args.out or _tables.output_folder() / f"{_tables.today()}-routing-cpu.csv"
    table = _tables.Table(out, COLUMNS, COLUMNS[:4], _tables.header(None, ["bfloat16 logits"]))
    cpu = torch.device("cpu")
    for tokens in TOKENS[:3] if args.quick else TOKENS:
        step = StepTokens.allocate(tokens, tokens, cpu)
        step.fill(torch.arange(tokens), torch.ones(tokens), torch.ones(tokens))
        context = ForwardContext(
            no_compile_layers={},
            attn_metadata={},
            slot_mapping={},
            is_padding=torch.zeros(tokens, dtype=torch.bool),
        )
        generator = torch.Generator().manual_seed(tokens)
        logits = 2 * torch.randn(tokens, EXPERTS, generator=generator).bfloat16()

        def make(keep: int, step: StepTokens = step) -> CapacityRouter:
            config = CapacityConfig(decode_keep=keep)
            plan = resolve(config, num_experts=EXPERTS, top_k=TOP_K, renormalize=True)
            router = CapacityRouter(
                CPURouter(top_k=TOP_K, global_num_experts=EXPERTS, renormalize=True),
                top_k=TOP_K,
                num_logical_experts=EXPERTS,
                scoring_func="softmax",
                renormalize=True,
                scale=1.0,
                plain=True,
            )
            router.bind(
                "layer",
                plan,
                LayerStats.allocate("layer", EXPERTS, cpu),
                step,
                seed=0,
                expert_device_E=None,
                own_device=None,
                backend="vllm",
                phantom=EXPERTS,
            )
            return router

        ours = {keep: make(keep) for keep in (TOP_K, TOP_K // 2)}
        stock = ours[TOP_K].inner
        calls = {"stock": stock, **{f"k0={keep}": router for keep, router in ours.items()}}
        times: dict[str, list[float]] = {name: [] for name in calls}
        with override_forward_context(context), torch.inference_mode():
            chosen = stock.select_experts(logits, logits)[1]
            for keep, router in ours.items():
                scores = torch.softmax(logits.float(), dim=-1)
                plan = resolve(
                    CapacityConfig(decode_keep=keep),
                    num_experts=EXPERTS,
                    top_k=TOP_K,
                    renormalize=True,
                )
                expected = route_torch(
                    scores, plan, topk_TK=chosen, is_decode_T=step.is_decode[:tokens]
                )
                held = router.select_experts(logits, logits)[1]
                if not torch.equal(held.sort().values.int(), expected.experts.sort().values):
                    sys.exit(f"gate: k0 = {keep} at {tokens} tokens isn't what route_torch holds")
            for turn in range(40 if args.quick else 2000):
                for name, router in calls.items():
                    start = time.perf_counter()
                    router.select_experts(logits, logits)
                    if turn >= 20:
                        times[name].append(1e6 * (time.perf_counter() - start))
        medians = {name: statistics.median(own) for name, own in times.items()}
        for name, median in medians.items():
            table.add(
                {
                    "tokens": tokens,
                    "experts": EXPERTS,
                    "top_k": TOP_K,
                    "contender": name,
                    "microseconds": median,
                    "over_stock": median / medians["stock"],
                    "more": median - medians["stock"],
                }
            )
            print(f"{tokens:4} tokens  {name:6} {median:8.1f} us", flush=True)


if __name__ == "__main__":
    main()
