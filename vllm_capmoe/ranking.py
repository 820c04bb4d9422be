"""Scores as integers, and how candidates rank: the order behind every choice of the routing.

Letters and steps: `torch_routing.py`. Integers only, the same on every rank, run after run.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from capmoe_kernels.contract import fmix32

_MASK = 0xFFFFFFFF
NAN_KEY = -(2**31)

MASS_BITS = 20
"""Gate mass is counted in units of 2^-20."""
MOST_MASS = 1024.0


def score_keys(scores_TE: Tensor) -> Tensor:
    """int64 [T, E] keys, all different in a row: higher score first, ties to the lower expert.

    The upper part of a key is the float32 score as an integer that rises with it: the bits of a
    float rise with its magnitude, so those of negative numbers are turned around. -0.0 counts as
    0.0 and NaN as less than -inf. The lower part counts the experts backwards.
    """
    E = scores_TE.shape[1]
    scores_TE = scores_TE.detach() + 0.0  # -0.0 + 0.0 is 0.0
    bits_TE = scores_TE.view(torch.int32)
    bits_TE = bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)
    bits_TE = bits_TE.masked_fill_(scores_TE.isnan(), NAN_KEY)
    backwards_E = torch.arange(E - 1, -1, -1, device=scores_TE.device)
    return (bits_TE.long() << expert_bits(E)).add_(backwards_E)


def expert_bits(num_experts: int) -> int:
    return (num_experts - 1).bit_length()


def choose_top_k(keys_TE: Tensor, top_k: int, topk_TK: Tensor | None = None) -> Tensor:
    """int64 [T, k]: the top-k experts of each token, best first (algorithm 1, line 1).

    topk_TK: the model's own choice, where it is not the plain top-k of the scores. It is only
    put in order. The ids of padding rows may be anything.
    """
    if topk_TK is None:
        return keys_TE.topk(top_k, dim=1).indices
    experts_TK = topk_TK.long().clamp(0, keys_TE.shape[1] - 1)
    return experts_TK.gather(1, best_first(keys_TE, experts_TK))


def best_first(keys_TE: Tensor, experts_TL: Tensor) -> Tensor:
    """int64 [T, L]: the columns of each row by falling score, ties to the lower expert."""
    return keys_TE.gather(1, experts_TL).argsort(dim=1, descending=True)


def draws(seed: int, index_T: Tensor, experts_TL: Tensor) -> Tensor:
    """int64 [T, L] in [0, 2^32): the draw of metric `random`.

    fmix32(fmix32(fmix32(seed) + token index) + expert), modulo 2^32. No two experts of a token
    have the same draw, since fmix32 maps different numbers to different numbers.
    """
    start = fmix32(torch.full_like(index_T[:1], seed & _MASK))
    token_T = fmix32((start + index_T) & _MASK)
    return fmix32((token_T[:, None] + experts_TL) & _MASK)


def token_index(T: int, real_T: Tensor | None, group_T: Tensor | None, count_G: Tensor) -> Tensor:
    """int64 [T]: the position of a token among the real tokens of its group.

    Neither padding nor another request changes it. Padding rows get a number without meaning.
    group_T: group of each token, G for padding rows; None for one group.
    """
    row_T = torch.arange(T, device=count_G.device)
    if group_T is not None:
        sorted_T, order_T = group_T.sort(stable=True)
        start_G1 = pad(count_G.cumsum(0), (1, 0))
        return torch.empty_like(row_T).scatter_(0, order_T, row_T - start_G1[sorted_T])
    return row_T if real_T is None else real_T.cumsum(0) - 1


def metric_keys(
    metric: str, keys_TE: Tensor, experts_TL: Tensor, index_T: Tensor | None, seed: int
) -> Tensor:
    """int64 [T, L] in [0, 2^32): the rank of a candidate in its bin, lower is better.

    Of candidates whose scores are numbers; `is_nan` puts the others behind them. Equal ranks go
    to the lower token index, then to the lower expert, since that is the order of the flat list:
    `fill_bins` sorts stably, and equal scores of a row stand by expert.
    metric: a name of `METRICS`; ValueError for another one.
    index_T: the token indices, for metric `random` only. `order` and `reverse-order` compare
    tokens of one group only, for which the row in the step does as well.
    """
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}, but it must be one of {', '.join(METRICS)}.")
    return METRICS[metric](keys_TE, experts_TL, index_T, seed)


def _by_score(keys_TE: Tensor, experts_TL: Tensor, index_T: Tensor | None, seed: int) -> Tensor:
    return 0x7FFFFFFF - (keys_TE.gather(1, experts_TL) >> expert_bits(keys_TE.shape[1]))


def _by_order(keys_TE: Tensor, experts_TL: Tensor, index_T: Tensor | None, seed: int) -> Tensor:
    T, E = keys_TE.shape
    return torch.arange(0, T * E, E, device=keys_TE.device)[:, None] + experts_TL


def _by_reverse_order(
    keys_TE: Tensor, experts_TL: Tensor, index_T: Tensor | None, seed: int
) -> Tensor:
    T, E = keys_TE.shape
    return torch.arange((T - 1) * E, -E, -E, device=keys_TE.device)[:, None] + experts_TL


def _by_draw(keys_TE: Tensor, experts_TL: Tensor, index_T: Tensor | None, seed: int) -> Tensor:
    assert index_T is not None
    return _MASK - draws(seed, index_T, experts_TL)


METRICS: dict[str, Callable[[Tensor, Tensor, Tensor | None, int], Tensor]] = {
    "score": _by_score,
    "order": _by_order,
    "reverse-order": _by_reverse_order,
    "random": _by_draw,
}


def fixed_point(scores: Tensor) -> Tensor:
    """int64: floor(S * 2^20), so that sums are the same in any order.

    For counting, not for choosing: S below 0 and NaN count as 0, above 1024 as 1024.
    """
    return (scores.nan_to_num(nan=0.0).clamp(0.0, MOST_MASS) * 2.0**MASS_BITS).long()


def is_nan(keys_TE: Tensor, experts_TL: Tensor) -> Tensor:
    """bool [T, L]: candidates with a NaN score. They win no seat over a number, in any metric."""
    return keys_TE.gather(1, experts_TL) >> expert_bits(keys_TE.shape[1]) == NAN_KEY
