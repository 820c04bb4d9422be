"""vLLM's EPLB mapping behind our router. Exit status 1: a wrong replica, or a wrong load.

Its real kernel, interpreted, which stands on GPUs only: on the CPU vLLM refuses `--enable-eplb`.
"""

# isort: off
import interpreted_vllm  # noqa: F401 (first)
# isort: on

import torch
from vllm.platforms import current_platform

type(current_platform).is_cuda_alike = lambda self: True  # decides whether vLLM has the kernel

from routers import MIXTRAL, E, K, T, forward_context, make, prompt_of_one_request  # noqa: E402
from vllm.distributed.eplb.eplb_state import EplbLayerState  # noqa: E402
from vllm.forward_context import override_forward_context  # noqa: E402

PHYSICAL = E + 2  # experts 0 and 1 have a second replica each
PROMPT, DECODE = 30, 5  # of T rows; the last two are padding


def main() -> None:
    replicas = torch.tensor([[0, E], [1, E + 1]] + [[e, -1] for e in range(2, E)])
    loads = torch.zeros(PHYSICAL, dtype=torch.int32)
    state = EplbLayerState()
    state.expert_load_view, state.logical_to_physical_map = loads, replicas
    state.logical_replica_count = (replicas >= 0).sum(1)
    state.should_record_tensor = torch.ones(1, dtype=torch.int32)
    state.num_unpadded_tokens_tensors = [torch.tensor([PROMPT + DECODE], dtype=torch.int32)]
    tokens, context = prompt_of_one_request(), forward_context()
    request = torch.tensor([0] * PROMPT + [1, 2, 3, 4, 5])
    positions = torch.tensor([*range(PROMPT), 9, 8, 7, 6, 5])
    tokens.fill(request, positions, torch.tensor([PROMPT, 9, 8, 7, 6, 5]))
    context.is_padding[PROMPT + DECODE :] = True
    for phantom in (None, PHYSICAL):
        router = make(MIXTRAL, tokens, mode="drop", factor=0.5, min_capacity=1)
        router.global_num_experts, router.eplb_state, router.phantom = PHYSICAL, state, phantom
        router.stats.recording = True
        logits = torch.randn(T, E, generator=torch.Generator().manual_seed(1))
        logits[:, 0] += 2.0  # a hot expert
        topk_ids = logits.topk(K).indices
        router._compute_routing = lambda *_, routed=(router, logits, topk_ids), **__: routed[
            0
        ].route(*routed[1:])
        loads.zero_()
        with override_forward_context(context):
            weights, physical = router.select_experts(hidden_states=logits, router_logits=logits)
        (record,) = router.stats.records
        logical = torch.tensor(record["experts"])
        dropped = logical < 0
        assert dropped.any() and (weights[dropped] == 0).all()
        assert (physical[dropped] == (-1 if phantom is None else phantom)).all()
        # The limit is that of the logical expert, over both its replicas.
        limit = -(-(PROMPT + DECODE) * K // (2 * E))
        assert record["capacity"] == [[limit]]
        kept, of = physical[~dropped].long(), logical[~dropped].long()
        assert torch.equal(torch.where(kept >= E, kept - E, kept), of)
        assert loads.tolist() == kept.bincount(minlength=PHYSICAL).tolist(), "what vLLM records"
        assert loads[E] > 0 and loads[0] + loads[E] == record["load_after"][0] <= limit + DECODE


if __name__ == "__main__":
    main()
