"""Steps without a limit on the CPU: `route_torch`'s integers, in numpy. Letters: torch_routing.py.

A decode step has few rows, and its routing costs what its calls cost: some sixty of torch in every
layer, and numpy's cost less. 16 rows of 64 experts took 370 to 660 us in torch and 120 to 250 here,
in turns on two busy cores of an Intel CPU. The host may look at values too, so a step in which
decode keep changes nothing ends early.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capmoe_kernels.contract import NO_LIMIT, Plan
from vllm_capmoe.ranking import MASS_BITS, MOST_MASS, NAN_KEY, expert_bits
from vllm_capmoe.torch_routing import Selection

Array = NDArray[np.int64]
Mask = NDArray[np.bool_]


def route_unlimited(
    scores_TE: Tensor,
    plan: Plan,
    *,
    topk_TK: Tensor,
    is_padding_T: Tensor | None = None,
    is_decode_T: Tensor | None = None,
    num_requests: int = 1,
    **_others: object,
) -> Selection | None:
    """What `route_torch` returns, to the bit, for a step in which no limit can be in effect.

    Those are the steps without a prompt token, and all steps in mode off or without a limit.
    Arguments as `route_torch`'s, on the CPU, with the model's own choice; who owns what, requests
    and seeds are for limits only.

    Returns:
        None for steps that may have a limit: `route_torch` does them.
    """
    T, k = topk_TK.shape
    real_T = np.ones(T, bool) if is_padding_T is None else ~is_padding_T.numpy()
    decode_T = np.zeros(T, bool) if is_decode_T is None else is_decode_T.numpy() & real_T
    limits = plan.mode != "off" and plan.gamma is not None
    if limits and (is_decode_T is None or (real_T & ~decode_T).any()):
        return None
    scores = scores_TE.detach().float().numpy()
    keys_TE = score_keys(scores)
    ids_TK = topk_TK.numpy().astype(np.int64).clip(0, plan.num_experts - 1)
    models_TK = best_first(keys_TE, ids_TK)
    held_TK = models_TK
    decodes = int(decode_T.sum())
    keep = plan.keeps[min(decodes, len(plan.keeps) - 1)] if plan.keeps else k
    if decodes and keep < k:
        held_TK = share_experts(keep, keys_TE, models_TK, real_T, decode_T)

    weights_TW = np.zeros((T, plan.width), np.float32)
    experts_TW = np.full((T, plan.width), -1, np.int32)
    weights_TW[:, :k] = kept_weights(scores[np.arange(T)[:, None], held_TK], plan.renormalize)
    experts_TW[:, :k] = held_TK
    if not real_T.all():
        experts_TW[~real_T], weights_TW[~real_T] = -1, 0.0
    before_E, after_E = (
        np.bincount(rows[real_T].ravel(), minlength=plan.num_experts).astype(np.int32)
        for rows in (models_TK, held_TK)
    )
    masses_TK = fixed_point(scores[np.arange(T)[:, None], models_TK])
    masses_TK[~real_T] = 0
    lost = 0
    if held_TK is not models_TK:
        lost = masses_TK[~(models_TK[:, :, None] == held_TK[:, None, :]).any(axis=2)].sum()
    groups = num_requests if plan.scope == "request" else 1
    return Selection(
        experts=torch.from_numpy(experts_TW),
        weights=torch.from_numpy(weights_TW),
        load_before=torch.from_numpy(before_E),
        load_after=torch.from_numpy(after_E),
        capacity=torch.full((groups, len(plan.bin_sizes)), NO_LIMIT, dtype=torch.int32),
        kept=torch.tensor(int(after_E.sum())),
        left_without=torch.tensor(0),
        mass=torch.tensor(int(masses_TK.sum())),
        lost=torch.tensor(int(lost)),
        prompts=torch.tensor(int(real_T.sum()) - decodes),
    )


def score_keys(scores_TE: NDArray[np.float32]) -> Array:
    """`ranking.score_keys`."""
    E = scores_TE.shape[1]
    scores_TE = scores_TE + np.float32(0)  # -0.0 + 0.0 is 0.0
    bits_TE = scores_TE.view(np.int32)
    bits_TE = bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)
    bits_TE[np.isnan(scores_TE)] = NAN_KEY
    return (bits_TE.astype(np.int64) << expert_bits(E)) + np.arange(E - 1, -1, -1)


def fixed_point(scores: NDArray[np.float32]) -> Array:
    """`ranking.fixed_point`."""
    scores = np.where(scores > 0, scores, np.float32(0))  # NaN isn't
    return (np.minimum(scores, np.float32(MOST_MASS)) * np.float32(2**MASS_BITS)).astype(np.int64)


def best_first(keys_TE: Array, experts_TK: Array) -> Array:
    """The experts of each row by falling score."""
    rows_T1 = np.arange(len(keys_TE))[:, None]
    order_TK = np.argsort(-keys_TE[rows_T1, experts_TK], axis=1)
    return experts_TK[rows_T1, order_TK]


def share_experts(keep: int, keys_TE: Array, topk_TK: Array, real_T: Mask, decode_T: Mask) -> Array:
    """`sharing.share_experts`, for a known k0."""
    (T, E), k = keys_TE.shape, topk_TK.shape[1]
    loaded_E = np.zeros(E, np.int64)
    loaded_E[topk_TK[decode_T, :keep].ravel()] = 1
    loaded_E[topk_TK[real_T & ~decode_T].ravel()] = 1
    # Kept before loaded, loaded before the rest of the top-k, and that before all others.
    own_TK = loaded_E[topk_TK] + 1
    own_TK[:, :keep] = 3
    rank_TE = np.tile(2 * loaded_E, (T, 1))
    rank_TE[np.arange(T)[:, None], topk_TK] = own_TK
    ranked_TE = keys_TE + (rank_TE << (32 + expert_bits(E)))
    shared_TK = np.argpartition(ranked_TE, E - k, axis=1)[:, E - k :]
    return np.where(decode_T[:, None], best_first(keys_TE, shared_TK), topk_TK)


def kept_weights(weights_TK: NDArray[np.float32], renormalize: bool) -> NDArray[np.float32]:
    """`reference.kept_weights`: the scores, or each over their sum, added column by column."""
    if not renormalize:
        return weights_TK
    total_T = weights_TK[:, 0].copy()
    with np.errstate(all="ignore"):  # infinities and NaN go their way, as in torch
        for column in range(1, weights_TK.shape[1]):
            total_T += weights_TK[:, column]
        total_T[total_T == 0] = 1.0
        return weights_TK / total_T[:, None]
