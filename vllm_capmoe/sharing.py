"""Decode keep: decode tokens share the experts that a step loads. Letters: torch_routing.py."""

from functools import lru_cache

import torch
from torch import Tensor

from vllm_capmoe.limits import count
from vllm_capmoe.ranking import best_first, expert_bits


@lru_cache(maxsize=256)
def keep_table(keeps: tuple[int, ...], device: torch.device) -> Tensor:
    """`Plan.keeps` on a device, int64 [n + 1], for a look-up by the number of decode tokens."""
    return torch.tensor(keeps, device=device)


def share_experts(
    keeps: tuple[int, ...],
    keys_TE: Tensor,
    topk_TK: Tensor,
    real_T: Tensor | None,
    decode_T: Tensor,
) -> Tensor:
    """int64 [T, k]: the top-k of prompt tokens, and what decode tokens hold instead of theirs.

    A decode token keeps the k0 best of its top-k. Loaded is every expert that a decode token keeps
    or a prompt token has in its top-k. The k - k0 other places of a decode token go to its best
    loaded experts, and where too few are loaded to the best ones left of its top-k.
    (Oncescu et al., arXiv 2511.02237, filled up to k.)

    decode_T: bool, real decode tokens. Rows are best first; those of padding stay as they are.

    Example, k = 2 and k0 = 1: tokens that rank the experts 0 1 2 3, 2 0 1 3 and 3 1 2 0 keep 0, 2
    and 3, which are loaded. The second places go to 2, 0 and 2, and nobody loads 1.
    """
    E, k = keys_TE.shape[1], topk_TK.shape[1]
    decode_1 = decode_T.sum().clamp(max=len(keeps) - 1).reshape(1)
    kept_K = torch.arange(k, device=keys_TE.device) < keep_table(keeps, keys_TE.device)[decode_1]
    decode_T1 = decode_T[:, None]
    loads_TK = kept_K | ~decode_T1
    if real_T is not None:
        loads_TK = loads_TK & real_T[:, None]
    loaded_E = count(topk_TK.where(loads_TK, E), E + 1)[:-1].clamp_(max=1)
    # Kept before loaded, loaded before the rest of the top-k, and that before all others.
    own_TK = (loaded_E[topk_TK] + 1).masked_fill(kept_K, 3)
    rank_TE = (2 * loaded_E).expand_as(keys_TE).scatter(1, topk_TK, own_TK)
    shared_TK = (keys_TE + (rank_TE << 32 + expert_bits(E))).topk(k, dim=1).indices
    shared_TK = shared_TK.gather(1, best_first(keys_TE, shared_TK))
    return topk_TK.where(~decode_T1, shared_TK)
