"""Steps without a limit on the CPU: `route_torch`'s integers, in numpy. Letters: torch_routing.py.

A decode step has few rows, and its routing costs what its calls cost: some sixty of torch in every
layer. numpy's cost less, the host may look at values and leave out what changes nothing, and what
is only counted can wait until many steps are counted at once (`count_steps`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capmoe_kernels.contract import NO_LIMIT, Plan, Selection
from vllm_capmoe.ranking import MASS_BITS, MOST_MASS, NAN_KEY, expert_bits

Array = NDArray[np.int64]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Held:
    """Who holds which expert in a step without a limit: every real token holds k.

    models_TK: int64, the model's own choice, best first. scores_TK: float32, its scores.
    held_TK: int64, what is held, best first; `models_TK` itself where nothing changed.
    weights_TK: float32. prompts: the tokens that are not decode.
    """

    models_TK: Array
    scores_TK: Floats
    held_TK: Array
    weights_TK: Floats
    prompts: int


def may_limit(plan: Plan, tokens: int, decodes: int) -> bool:
    """Whether a step of so many real tokens, decode tokens among them, may have a limit."""
    return plan.mode != "off" and plan.gamma is not None and decodes < tokens


def hold(scores_TE: Floats, plan: Plan, topk_TK: Array, decode_T: Mask | None) -> Held:
    """A step of real tokens in which no limit is in effect.

    topk_TK: the model's own choice. decode_T: None where there is no decode token.
    """
    T, k = topk_TK.shape
    decodes = 0 if decode_T is None else int(np.count_nonzero(decode_T))
    keep = plan.keeps[min(decodes, len(plan.keeps) - 1)] if plan.keeps else k
    rows_T1 = np.arange(T)[:, None]
    if decode_T is not None and decodes and keep < k and T > 1:
        keys_TE = score_keys(scores_TE)
        models_TK = topk_TK[rows_T1, np.argsort(-keys_TE[rows_T1, topk_TK], axis=1)]
        held_TK = share_experts(keep, keys_TE, models_TK, decode_T)
    else:
        # By falling score, ties to the lower expert, NaN last: as `score_keys` has it.
        order_TK = np.lexsort((topk_TK, -scores_TE[rows_T1, topk_TK]))
        models_TK = held_TK = topk_TK[rows_T1, order_TK]
    scores_TK = scores_TE[rows_T1, models_TK]
    weights_TK = scores_TK.copy() if held_TK is models_TK else scores_TE[rows_T1, held_TK]
    if plan.renormalize:
        weights_TK = renormalized(weights_TK)
    return Held(models_TK, scores_TK, held_TK, weights_TK, T - decodes)


def count_steps(steps: Sequence[Held], num_experts: int) -> dict[str, Array]:
    """The counts of several steps: fields of `Selection` by name, int64, steps along axis 0."""
    rows_S = np.array([len(step.models_TK) for step in steps])
    ends_S, S, E = rows_S.cumsum(), len(steps), num_experts
    models_RK = np.concatenate([step.models_TK for step in steps])
    held_RK = np.concatenate([step.held_TK for step in steps])
    first_R1 = np.repeat(np.arange(0, S * E, E), rows_S)[:, None]

    def loads(experts_RK: Array) -> Array:
        return np.bincount((experts_RK + first_R1).ravel(), minlength=S * E).reshape(S, E)

    def by_step(masses_RK: Array) -> Array:
        total = np.concatenate(([0], masses_RK.sum(axis=1).cumsum()))
        return total[ends_S] - total[ends_S - rows_S]

    masses_RK = fixed_point(np.concatenate([step.scores_TK for step in steps]))
    before_SE, after_SE, lost_S = loads(models_RK), loads(held_RK), np.zeros(S, np.int64)
    if any(step.held_TK is not step.models_TK for step in steps):
        stays_RK = (models_RK[:, :, None] == held_RK[:, None, :]).any(axis=2)
        lost_S = by_step(np.where(stays_RK, 0, masses_RK))
    return {
        "load_before": before_SE,
        "load_after": after_SE,
        "kept": after_SE.sum(axis=1),
        "left_without": np.zeros(S, np.int64),
        "mass": by_step(masses_RK),
        "lost": lost_S,
        "prompts": np.array([step.prompts for step in steps]),
    }


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
    decode_T = None if is_decode_T is None else is_decode_T.numpy()[real_T]
    decodes = 0 if decode_T is None else int(np.count_nonzero(decode_T))
    if may_limit(plan, int(np.count_nonzero(real_T)), decodes):
        return None
    ids_TK = topk_TK.numpy()[real_T].astype(np.int64).clip(0, plan.num_experts - 1)
    held = hold(scores_TE.detach().float().numpy()[real_T], plan, ids_TK, decode_T)

    weights_TW = np.zeros((T, plan.width), np.float32)
    experts_TW = np.full((T, plan.width), -1, np.int32)
    weights_TW[real_T, :k], experts_TW[real_T, :k] = held.weights_TK, held.held_TK
    counts = count_steps([held], plan.num_experts)
    groups = num_requests if plan.scope == "request" else 1
    return Selection(
        experts=torch.from_numpy(experts_TW),
        weights=torch.from_numpy(weights_TW),
        capacity=torch.full((groups, len(plan.bin_sizes)), NO_LIMIT, dtype=torch.int32),
        load_before=torch.from_numpy(counts["load_before"][0].astype(np.int32)),
        load_after=torch.from_numpy(counts["load_after"][0].astype(np.int32)),
        kept=torch.tensor(int(counts["kept"][0])),
        left_without=torch.tensor(int(counts["left_without"][0])),
        mass=torch.tensor(int(counts["mass"][0])),
        lost=torch.tensor(int(counts["lost"][0])),
        prompts=torch.tensor(int(counts["prompts"][0])),
    )


def score_keys(scores_TE: Floats) -> Array:
    """`ranking.score_keys`."""
    E = scores_TE.shape[1]
    scores_TE = scores_TE + np.float32(0)  # -0.0 + 0.0 is 0.0
    bits_TE = scores_TE.view(np.int32)
    bits_TE = bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)
    bits_TE[np.isnan(scores_TE)] = NAN_KEY
    return (bits_TE.astype(np.int64) << expert_bits(E)) + np.arange(E - 1, -1, -1)


def fixed_point(scores: Floats) -> Array:
    """`ranking.fixed_point`."""
    scores = np.where(scores > 0, scores, np.float32(0))  # NaN isn't
    return (np.minimum(scores, np.float32(MOST_MASS)) * np.float32(2**MASS_BITS)).astype(np.int64)


def share_experts(keep: int, keys_TE: Array, topk_TK: Array, decode_T: Mask) -> Array:
    """`sharing.share_experts`, for a known k0 and real tokens."""
    (T, E), k = keys_TE.shape, topk_TK.shape[1]
    rows_T1 = np.arange(T)[:, None]
    all_decode = decode_T.all()
    loaded_E = np.zeros(E, np.int64)
    loaded_E[topk_TK[:, :keep]] = 1
    if not all_decode:
        loaded_E[topk_TK[~decode_T]] = 1
    # Kept before loaded, loaded before the rest of the top-k, and that before all others.
    own_TK = loaded_E[topk_TK] + 1
    own_TK[:, :keep] = 3
    rank_TE = np.tile(2 * loaded_E, (T, 1))
    rank_TE[rows_T1, topk_TK] = own_TK
    ranked_TE = keys_TE + (rank_TE << (32 + expert_bits(E)))
    shared_TK = np.argpartition(ranked_TE, E - k, axis=1)[:, E - k :]
    shared_TK = shared_TK[rows_T1, np.argsort(-keys_TE[rows_T1, shared_TK], axis=1)]
    return shared_TK if all_decode else np.where(decode_T[:, None], shared_TK, topk_TK)


def renormalized(weights_TK: Floats) -> Floats:
    """Each score over the sum of its row, added column by column, as `kept_weights` does it."""
    with np.errstate(all="ignore"):  # infinities and NaN go their way, as in torch
        total_T1 = np.add.accumulate(weights_TK, axis=1)[:, -1:]
        return weights_TK / np.where(total_T1 == 0, np.float32(1), total_T1)
