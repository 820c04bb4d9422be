"""Capacity-aware routing in plain torch: the method of arXiv 2503.05066, step by step.

Notation, as in the paper. Names carry their shapes: `scores_TE` is [T, E].

    T       tokens in the step (rows, padding included)      gamma  capacity factor
    E       routed experts of the layer                      C      capacity of one bin
    k, K    experts per token                                m      extra candidates per token
    W       most experts a token can hold (K' in route)      n_d    experts on device d
    S[T, E] gating scores                                    N_e    load of expert e
    L       candidates per token, k or k + m                 N      assignments, T * L
    G       groups: 1, or one per request                    D      devices (expert parallel ranks)
    B       bins of a group: E experts, or D devices         X      1, or D at level device

A group is the set of tokens over which T, the mean load and C are counted. A bin is what a
capacity bounds: an (expert, group) pair, or a (device, group) pair. An assignment is a
(token, expert) pair.

The steps, in the order in which `route_torch` takes them:

    score_keys        floats to integers of the same order, so that all choices are exact
    choose_top_k      algorithm 1, line 1: the k best experts of each token
    capacity          C = ceil(gamma * T * k / E), in integers
    extra_candidates  algorithm 2, line 1: m more candidates per token
    metric_keys       the metric by which a bin ranks its candidates
    fill_bins         algorithms 1 and 2: every bin keeps its C best
    pack_rows         what a token holds, and its weights

Everything is integer sorting and counting on flat lists of fixed length. No shape and no Python
branch depends on a value in a tensor, nothing is read back to the host, and nothing is random:
the result is the same on every rank, run after run, and the function can be captured in a CUDA
graph once its capacity table exists (one call of the same size before the capture).
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_capmoe.plan import Plan

__all__ = ["NO_LIMIT", "Plan", "Selection", "capacity", "capacity_table", "route_torch"]

NO_LIMIT = 2**31 - 1
"""The capacity of a group in which no limit is in effect: every load is below it."""

_MASK = 0xFFFFFFFF
_NAN_KEY = -(2**31)


@dataclass(frozen=True, eq=False)
class Selection:
    """Who holds which expert. All fields are tensors on the device of the scores.

    experts: int32 [T, W], by descending score, ties to the lower expert; -1 where unused.
    weights: float32 [T, W]; 0 where unused.
    load_before: int32 [E], the top-k assignments of the real tokens.
    load_after: int32 [E], the assignments that are held.
    capacity: int32 [G, X]; NO_LIMIT where none is in effect.
    kept: int64 [], the top-k assignments that are held.
    left_without: int64 [], the real tokens that hold no expert.
    """

    experts: Tensor
    weights: Tensor
    load_before: Tensor
    load_after: Tensor
    capacity: Tensor
    kept: Tensor
    left_without: Tensor

    @property
    def dropped(self) -> Tensor:
        """int64 []: top-k assignments of real tokens that are not held."""
        return self.load_before.sum() - self.kept

    @property
    def expanded(self) -> Tensor:
        """int64 []: held assignments outside of the token's top-k."""
        return self.load_after.sum() - self.kept


# --- Scores as integers ---------------------------------------------------------------------


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
    bits_TE = bits_TE.masked_fill_(scores_TE.isnan(), _NAN_KEY)
    backwards_E = torch.arange(E - 1, -1, -1, device=scores_TE.device)
    return (bits_TE.long() << _expert_bits(E)).add_(backwards_E)


def _expert_bits(num_experts: int) -> int:
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


# --- Capacity -------------------------------------------------------------------------------


def capacity(
    tokens: int,
    *,
    num_experts: int,
    top_k: int,
    gamma: Fraction,
    min_capacity: int = 1,
    experts: int = 1,
) -> int:
    """The limit of a bin of n experts: max(n * min_capacity, ceil(n * gamma * T * k / E)).

    With n = 1 the paper's C = ceil(gamma * N), N = T * k / E the mean load, at least
    min_capacity; with n = n_d the limit of device d ("device-level capacity"). tokens is T of
    the group. Integers only, so that gamma = 1.1 and a mean load of 10 give 11:

        >>> capacity(40, num_experts=8, top_k=2, gamma=Fraction("1.1"))
        11
    """
    assignments = experts * gamma.numerator * tokens * top_k
    ceiling = -(-assignments // (gamma.denominator * num_experts))
    return max(experts * min_capacity, ceiling)


def capacities(plan: Plan, experts: int, max_tokens: int) -> Tensor:
    """int64 [max_tokens + 1]: `capacity` of a bin of n experts for 0, 1, ... tokens."""
    assert plan.gamma is not None
    per_token = plan.gamma * experts * plan.top_k / plan.num_experts
    if max(per_token.numerator * max_tokens, per_token.denominator) < 2**62:
        ceilings_T = -(-torch.arange(max_tokens + 1) * per_token.numerator // per_token.denominator)
        return ceilings_T.clamp_(min=experts * plan.min_capacity)
    exact = [
        capacity(
            tokens,
            num_experts=plan.num_experts,
            top_k=plan.top_k,
            gamma=plan.gamma,
            min_capacity=plan.min_capacity,
            experts=experts,
        )
        for tokens in range(max_tokens + 1)
    ]
    return torch.tensor([min(limit, NO_LIMIT) for limit in exact])


@lru_cache(maxsize=256)
def _capacity_table(plan: Plan, max_tokens: int, device: torch.device) -> tuple[Tensor, int]:
    sizes = torch.tensor(plan.bin_sizes)
    limit_by_size = {n: capacities(plan, n, max_tokens) for n in set(plan.bin_sizes)}
    limit_TX = torch.stack([limit_by_size[n] for n in plan.bin_sizes], dim=1)
    # A bin of n experts takes at most T * min(k, n) assignments of the top-k.
    most_TX = torch.arange(max_tokens + 1)[:, None] * sizes.clamp(max=plan.top_k)
    free_T = (limit_TX >= most_TX).all(dim=1)
    limited = (~free_T).nonzero().flatten()
    first = int(limited[0]) if len(limited) else NO_LIMIT
    table = limit_TX.clamp_(max=NO_LIMIT).masked_fill_(free_T[:, None], NO_LIMIT)
    return table.int().to(device), first


def capacity_table(plan: Plan, max_tokens: int, device: torch.device) -> tuple[Tensor, int]:
    """The limits of groups of 0, 1, ... max_tokens (or more) tokens, for look-ups by a tensor.

    Returns the table, int32 [max_tokens + 1 or more, X], with NO_LIMIT in the rows of groups in
    which no load can pass its limit, and the lowest number of tokens that has a limit (NO_LIMIT
    if none has). Built once for each power of two of max_tokens and kept.
    """
    return _capacity_table(plan, 1 << max(max_tokens, 1).bit_length(), device)


# --- Candidates -----------------------------------------------------------------------------


def extra_candidates(
    keys_TE: Tensor, topk_TK: Tensor, extra: int, local_TE: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The m best experts outside of the top-k, best first (algorithm 2, line 1).

    local_TE: bool, the experts on the token's own device; None for all experts.
    Returns int64 [T, m] and a bool [T, m] of those that exist, None if all do: a device may
    have fewer than m experts that are not in the top-k.
    """
    least = torch.iinfo(torch.int64).min  # below every key
    rest_TE = keys_TE.scatter(1, topk_TK, least)
    if local_TE is not None:
        rest_TE = rest_TE.masked_fill_(~local_TE, least)
    best = rest_TE.topk(extra, dim=1)
    return best.indices, None if local_TE is None else best.values != least


# --- Metrics --------------------------------------------------------------------------------


def fmix32(x: Tensor) -> Tensor:
    """Murmur3's 32-bit finaliser on int64 tensors with values in [0, 2^32).

    x ^= x >> 16; x *= 0x85ebca6b; x ^= x >> 13; x *= 0xc2b2ae35; x ^= x >> 16, modulo 2^32.
    A product may pass 2^63, but the 32 lowest bits are right all the same.
    """
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


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
    index_T: the token indices, for metric `random` only. `order` and `reverse-order` compare
    tokens of one group only, for which the row in the step does as well.
    """
    T, E = keys_TE.shape
    if metric == "score":
        return 0x7FFFFFFF - (keys_TE.gather(1, experts_TL) >> _expert_bits(E))
    if metric == "random":
        assert index_T is not None
        return _MASK - draws(seed, index_T, experts_TL)
    first, last, step = (0, T * E, E) if metric == "order" else ((T - 1) * E, -E, -E)
    return torch.arange(first, last, step, device=keys_TE.device)[:, None] + experts_TL


# --- Selection ------------------------------------------------------------------------------


def count(index: Tensor, size: int) -> Tensor:
    """int64 [size]: how often each number in [0, size) occurs. Integers, so order is nothing."""
    index_N = index.reshape(-1)
    zeros = torch.zeros(size, dtype=torch.int64, device=index.device)
    return zeros.scatter_add_(0, index_N, torch.ones_like(index_N))


def is_nan(keys_TE: Tensor, experts_TL: Tensor) -> Tensor:
    """bool [T, L]: candidates with a NaN score. They win no seat over a number, in any metric."""
    return keys_TE.gather(1, experts_TL) >> _expert_bits(keys_TE.shape[1]) == _NAN_KEY


def fill_bins(
    bin_TL: Tensor, nan_TL: Tensor, class_T: Tensor | None, rank_TL: Tensor, seats_B1: Tensor
) -> Tensor:
    """bool [T, L]: which assignments win a seat (algorithms 1 and 2, the line "keep top C").

    bin_TL: int64, flat bin of an assignment, the last one for those that do not compete.
    nan_TL: bool, seated last. class_T: 0 or 1, class 0 is seated first.
    rank_TL: int64 in [0, 2^32), lower is better. seats_B1: int64, seats per flat bin.

    One stable sort by (bin, nan, class, rank, token, expert); the position within the bin is the
    position in the sorted list less the start of the bin, and the first `seats` positions win.
    """
    keys_TL = (((bin_TL << 1) + nan_TL) << 33) + rank_TL
    if class_T is not None:
        keys_TL += (class_T.long() << 32)[:, None]
    sorted_N, order_N = keys_TL.reshape(-1).sort(stable=True)
    sorted_N >>= 34
    count_B1 = count(bin_TL, seats_B1.shape[0])
    end_of_seats_B1 = count_B1.cumsum(0) - count_B1 + seats_B1
    wins_N = torch.arange(sorted_N.shape[0], device=sorted_N.device) < end_of_seats_B1[sorted_N]
    return torch.empty_like(wins_N).scatter_(0, order_N, wins_N).view(bin_TL.shape)


def _and(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Both masks; None is true everywhere."""
    if left is None or right is None:
        return left if right is None else right
    return left & right


def _column(mask_T: Tensor | None) -> Tensor | None:
    return None if mask_T is None else mask_T[:, None]


def group_limits(
    plan: Plan,
    table: Tensor,
    T: int,
    real_T: Tensor | None,
    prompt_T: Tensor | None,
    group_T: Tensor | None,
    num_groups: int,
) -> tuple[Tensor, Tensor]:
    """int64 [G], the real tokens of each group, and int32 [G, X], its limits or NO_LIMIT.

    No limit is in effect in a group of fewer than min_tokens, in a group without a prompt token,
    and where no load can pass its limit (which the table of capacities says).
    """
    if group_T is not None:
        count_G = count(group_T, num_groups + 1)[:-1]
    elif real_T is not None:
        count_G = real_T.sum().reshape(1)
    else:
        count_G = torch.full((1,), T, device=table.device)
    limit_GX = table[count_G]
    if plan.min_tokens > 0:
        limit_GX = limit_GX.masked_fill((count_G < plan.min_tokens)[:, None], NO_LIMIT)
    if prompt_T is not None and prompt_T is not real_T:
        if group_T is None:
            prompts_G = prompt_T.sum().reshape(1)
        else:
            prompts_G = count(group_T.where(prompt_T, num_groups), num_groups + 1)[:-1]
        limit_GX = limit_GX.masked_fill((prompts_G == 0)[:, None], NO_LIMIT)
    return count_G, limit_GX


# --- Rows of the result ---------------------------------------------------------------------


def kept_weights(weights_TW: Tensor, unused_TW: Tensor | None, renormalize: bool) -> Tensor:
    """float32 [T, W]: the scores as they are, or w_i / (w_0 + w_1 + ...), summed in row order.

    The sum is taken column by column, so that its roundings are the same everywhere. A row whose
    sum is 0 stays as it is. unused_TW: bool, the places that hold no expert; they stay 0, also
    where the sum is negative or NaN. None if there are none.
    """
    if not renormalize:
        return weights_TW
    total_T = weights_TW[:, 0].clone()
    for w in range(1, weights_TW.shape[1]):
        total_T += weights_TW[:, w]
    weights_TW = weights_TW / total_T.masked_fill_(total_T == 0, 1.0)[:, None]
    return weights_TW if unused_TW is None else weights_TW.masked_fill_(unused_TW, 0.0)


def pack_rows(
    plan: Plan,
    scores_TE: Tensor,
    topk_TK: Tensor,
    real_T: Tensor | None,
    experts_TL: Tensor,
    held_TL: Tensor | None,
    is_topk_TL: Tensor | None,
    limit_GX: Tensor,
) -> Selection:
    """What each token holds, with weights, loads and counts.

    The held experts of a row move to the left in their order (best first); the first W stay,
    which is the cut by `max_experts`. held_TL None: all are held. is_topk_TL None: all are in the
    top-k.
    """
    T, L = experts_TL.shape
    E, W = plan.num_experts, plan.width
    scores_TL = scores_TE.gather(1, experts_TL)
    unused_TW = None
    if held_TL is None and L == W:
        experts_TW, weights_TW = experts_TL, scores_TL
        load_after_E = count(experts_TL, E)
    else:
        if held_TL is None:
            column_TL = torch.arange(L, device=scores_TE.device).expand(T, L)
        else:
            column_TL = held_TL.cumsum(1).sub_(1).masked_fill_(~held_TL, W).clamp_(max=W)
            if is_topk_TL is not None and L > W:
                held_TL = column_TL < W
        experts_TW = experts_TL.new_full((T, W + 1), E).scatter_(1, column_TL, experts_TL)[:, :W]
        weights_TW = scores_TL.new_zeros((T, W + 1)).scatter_(1, column_TL, scores_TL)[:, :W]
        load_after_E = count(experts_TW, E + 1)[:-1]
        unused_TW = experts_TW == E
        experts_TW = experts_TW.masked_fill(unused_TW, -1)
    if real_T is None:
        load_before_E = count(topk_TK, E)
    else:
        load_before_E = count(topk_TK.where(real_T[:, None], E), E + 1)[:-1]
    if is_topk_TL is None or held_TL is None:
        kept = load_after_E.sum()
    else:
        kept = (held_TL & is_topk_TL).sum()
    without_T = _and(experts_TW[:, 0] < 0, real_T)
    assert without_T is not None
    return Selection(
        experts=experts_TW.int(),
        weights=kept_weights(weights_TW, unused_TW, plan.renormalize).contiguous(),
        load_before=load_before_E.int(),
        load_after=load_after_E.int(),
        capacity=limit_GX,
        kept=kept,
        left_without=without_T.sum(),
    )


def _plain_top_k(
    plan: Plan, scores_TE: Tensor, topk_TK: Tensor, real_T: Tensor | None, num_groups: int
) -> Selection:
    """The step without any limit."""
    held_TK = None if real_T is None else real_T[:, None].expand_as(topk_TK)
    size = (num_groups, len(plan.bin_sizes))
    limit_GX = torch.full(size, NO_LIMIT, dtype=torch.int32, device=scores_TE.device)
    return pack_rows(plan, scores_TE, topk_TK, real_T, topk_TK, held_TK, None, limit_GX)


# --- The whole ------------------------------------------------------------------------------


def route_torch(
    scores_TE: Tensor,
    plan: Plan,
    *,
    topk_TK: Tensor | None = None,
    is_padding_T: Tensor | None = None,
    is_decode_T: Tensor | None = None,
    request_T: Tensor | None = None,
    num_requests: int = 1,
    is_image_T: Tensor | None = None,
    device_E: Tensor | None = None,
    token_device_T: Tensor | None = None,
    seed: int = 0,
) -> Selection:
    """Token Drop and Expanded Drop (algorithms 1 and 2) for the tokens of one step.

    Nothing is validated here: `vllm_capmoe.ops.route` does that and documents the rules.

    scores_TE: float [T, E]. plan: resolved for E and k.
    topk_TK: int [T, k], the model's own choice, distinct in the rows of real tokens.
    is_padding_T, is_decode_T, is_image_T: bool [T] or None. is_image_T is used if the plan has a
    priority.
    request_T: int64 [T] in [0, num_requests) for real tokens, used at scope request; num_requests
    may be larger than what occurs.
    device_E, token_device_T: int64 [E] and [T], used at level device and for local candidates.
    seed: for metric random.

    T * E, and num_requests times the bins of a group, must be below 2^29.
    """
    T, k, B = scores_TE.shape[0], plan.top_k, plan.num_bins
    G = num_requests if plan.scope == "request" else 1
    real_T = None if is_padding_T is None else ~is_padding_T
    scores_TE = scores_TE.float()
    keys_TE = score_keys(scores_TE)
    models_TK, topk_TK = topk_TK, choose_top_k(keys_TE, k, topk_TK)

    # Steps in which no limit can be in effect, whatever the tensors hold: plain top-k.
    if plan.mode == "off" or plan.gamma is None or plan.min_tokens > T:
        return _plain_top_k(plan, scores_TE, topk_TK, real_T, G)
    table, first_limited = capacity_table(plan, T, scores_TE.device)
    if first_limited > T:
        return _plain_top_k(plan, scores_TE, topk_TK, real_T, G)

    # Capacity of each group. Padding rows are in a group of their own, number G.
    group_T = None
    if plan.scope == "request":
        assert request_T is not None
        group_T = request_T if real_T is None else request_T.where(real_T, G)
    prompt_T = real_T if is_decode_T is None else _and(real_T, ~is_decode_T)
    count_G, limit_GX = group_limits(plan, table, T, real_T, prompt_T, group_T, G)

    # Candidates of each token, best first.
    experts_TL, candidate_TL, is_topk_TL = topk_TK, _column(real_T), None
    if plan.extra > 0:
        local_TE = None
        if plan.local:
            assert device_E is not None and token_device_T is not None
            local_TE = device_E == token_device_T[:, None]
        extra_TM, exists_TM = extra_candidates(keys_TE, topk_TK, plan.extra, local_TE)
        limited_T1 = limit_GX[:, :1] != NO_LIMIT
        if group_T is not None:
            limited_T1 = limited_T1[group_T.clamp(max=G - 1)]
        allowed_TM = _and(_and(limited_T1, _column(prompt_T)), exists_TM)
        assert allowed_TM is not None
        experts_TL = torch.cat([topk_TK, extra_TM], dim=1)
        is_topk_TL = (
            torch.arange(experts_TL.shape[1], device=table.device).expand_as(experts_TL) < k
        )
        candidate_TL = _and(is_topk_TL, _column(real_T))
        assert candidate_TL is not None
        candidate_TL = torch.cat([candidate_TL[:, :k], allowed_TM.expand(T, plan.extra)], dim=1)
        if models_TK is not None:  # its experts need not be better than the extra ones
            order_TL = best_first(keys_TE, experts_TL)
            experts_TL = experts_TL.gather(1, order_TL)
            is_topk_TL = is_topk_TL.gather(1, order_TL)
            candidate_TL = candidate_TL.gather(1, order_TL)

    # Bins and their seats. Assignments that do not compete are in one bin more, without seats.
    bin_TL = experts_TL
    if plan.level == "device":
        assert device_E is not None
        bin_TL = device_E[experts_TL]
    if group_T is not None:
        bin_TL = bin_TL + (group_T * B)[:, None]
    seats_B1 = pad(limit_GX.long().expand(G, B).reshape(-1), (0, 1))
    decode_TL = None
    if is_decode_T is not None:  # seated first, with their top-k
        decode_TL = _and(candidate_TL, _column(is_decode_T))
        assert decode_TL is not None
        decode_load_B1 = count(bin_TL.where(decode_TL, G * B), G * B + 1)
        seats_B1 = (seats_B1 - decode_load_B1).clamp_(min=0)
    competing_TL = candidate_TL if is_decode_T is None else _and(candidate_TL, _column(prompt_T))
    if competing_TL is not None:
        bin_TL = bin_TL.where(competing_TL, G * B)

    # Every bin keeps its best.
    index_T = token_index(T, real_T, group_T, count_G) if plan.metric == "random" else None
    rank_TL = metric_keys(plan.metric, keys_TE, experts_TL, index_T, seed)
    class_T = None
    if plan.priority != "uniform":
        assert is_image_T is not None
        class_T = is_image_T if plan.priority == "image-first" else ~is_image_T
    held_TL = fill_bins(bin_TL, is_nan(keys_TE, experts_TL), class_T, rank_TL, seats_B1)
    if decode_TL is not None:
        held_TL = held_TL | decode_TL
    return pack_rows(plan, scores_TE, topk_TK, real_T, experts_TL, held_TL, is_topk_TL, limit_GX)
