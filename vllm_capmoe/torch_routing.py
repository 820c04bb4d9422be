"""Capacity-aware routing in plain torch: the method of arXiv 2503.05066, step by step.

Notation, as in the paper. Names carry their shapes: `scores_TE` is [T, E].

    T       tokens in the step (rows, padding included)      gamma  capacity factor
    E       routed experts of the layer                      C      capacity of one bin
    k, K    experts per token                                m      extra candidates per token
    W       most experts a token can hold (K' in route)      n_d    experts on device d
    S[T, E] gating scores                                    N_e    load of expert e
    L       candidates per token, k or k + m                 N      assignments, T * L
    M       m, as a shape                                    l      bids that a token lost
    G       groups: 1, or one per request                    D      devices (expert parallel ranks)
    k0      experts that decode keep leaves to a token
    B       bins of a group: E experts, or D devices         X      1, or D at level device

A group is the set of tokens over which T, the mean load and C are counted. A bin is what a
capacity bounds: an (expert, group) pair, or a (device, group) pair. An assignment is a
(token, expert) pair.

The steps, in the order in which `route_torch` takes them:

    score_keys        floats to integers of the same order, so that all choices are exact
    choose_top_k      algorithm 1, line 1: the k best experts of each token
    share_experts     decode keep: decode tokens share what the step loads (sharing.py)
    group_limits      C = ceil(gamma * T * k / E), in integers (limits.py, capmoe_kernels.capacity)
    extra_candidates  algorithm 2, line 1: m more candidates per token
    metric_keys       the metric by which a bin ranks its candidates (ranking.py, as the first two)
    fill_bins         algorithms 1 and 2: every bin keeps its C best
    reroute           this project's: a token that lost l bids makes l more, where seats are free
    pack_rows         what a token holds, and its weights

Everything is integer sorting and counting on flat lists of fixed length. No shape and no Python
branch depends on a value in a tensor, nothing is read back to the host, and nothing is random:
the result is the same on every rank, run after run, and the function can be captured in a CUDA
graph once its tables exist (one call of the same size before the capture).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from capmoe_kernels.capacity import capacity_table
from capmoe_kernels.contract import NO_LIMIT, Plan, Selection
from vllm_capmoe.limits import below_the_busiest, count, group_limits
from vllm_capmoe.ranking import (
    best_first,
    choose_top_k,
    fixed_point,
    is_nan,
    metric_keys,
    score_keys,
    token_index,
)
from vllm_capmoe.sharing import share_experts

__all__ = ["route_torch"]


# --- Candidates -----------------------------------------------------------------------------


def extra_candidates(
    keys_TE: Tensor, topk_TK: Tensor, extra: int, allowed_TE: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The m best experts outside of the top-k, best first (algorithm 2, line 1).

    allowed_TE: bool, such as the experts on the token's own device; None for all experts.
    Returns int64 [T, m] and a bool [T, m] of those that exist, None if all do: of the allowed
    ones fewer than m may not be in the top-k.
    """
    least = torch.iinfo(torch.int64).min  # below every key
    rest_TE = keys_TE.scatter(1, topk_TK, least)
    if allowed_TE is not None:
        rest_TE = rest_TE.masked_fill_(~allowed_TE, least)
    best = rest_TE.topk(extra, dim=1)
    return best.indices, None if allowed_TE is None else best.values != least


def join(
    topk_TK: Tensor, extra_TM: Tensor, top_TK: Tensor | None, more_TM: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k and extra candidates as one [T, L]: the experts, which are of the top-k, and a mask.

    top_TK, more_TM: bool, the parts of that mask; also [T, 1], None is true everywhere.
    """
    true_TK, false_TM = torch.ones_like(topk_TK).bool(), torch.zeros_like(extra_TM).bool()
    mask_TK = true_TK if top_TK is None else top_TK.expand_as(topk_TK)
    return (
        torch.cat([topk_TK, extra_TM], dim=1),
        torch.cat([true_TK, false_TM], dim=1),
        torch.cat([mask_TK, more_TM.expand_as(extra_TM)], dim=1),
    )


def in_order(keys_TE: Tensor, experts_TL: Tensor, *others_TL: Tensor) -> tuple[Tensor, ...]:
    """The experts of each row best first, and others that stand beside them."""
    order_TL = best_first(keys_TE, experts_TL)
    return tuple(each_TL.gather(1, order_TL) for each_TL in (experts_TL, *others_TL))


# --- Bins and seats -------------------------------------------------------------------------


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


@dataclass(frozen=True, eq=False)
class Bins:
    """The flat bins of a step, G * B of them, and one more for what does not compete.

    plan, keys_TE, device_E, seed: as in `route_torch` and `score_keys`.
    group_T: group of each token, G for padding rows; None for one group.
    index_T: token indices, for metric random. class_T: 0 or 1, class 0 is seated first; or None.
    """

    plan: Plan
    keys_TE: Tensor
    device_E: Tensor | None
    group_T: Tensor | None
    num_groups: int
    index_T: Tensor | None
    class_T: Tensor | None
    seed: int

    @property
    def size(self) -> int:
        return self.num_groups * self.plan.num_bins + 1

    def of(self, experts_TL: Tensor, competing_TL: Tensor | None) -> Tensor:
        """int64 [T, L]: the flat bin of each assignment, the last one if it does not compete."""
        bin_TL = experts_TL
        if self.plan.level == "device":
            assert self.device_E is not None
            bin_TL = self.device_E[experts_TL]
        if self.group_T is not None:
            bin_TL = bin_TL + (self.group_T * self.plan.num_bins)[:, None]
        return bin_TL if competing_TL is None else bin_TL.where(competing_TL, self.size - 1)

    def load(self, experts_TL: Tensor, counted_TL: Tensor | None) -> Tensor:
        """int64 [size]: the assignments in each bin, 0 in the last one."""
        load_B1 = count(self.of(experts_TL, counted_TL), self.size)
        load_B1[-1] = 0
        return load_B1

    def fill(self, experts_TL: Tensor, competing_TL: Tensor | None, seats_B1: Tensor) -> Tensor:
        """bool [T, L]: the assignments that win a seat. Rows of experts stand by score."""
        rank_TL = metric_keys(self.plan.metric, self.keys_TE, experts_TL, self.index_T, self.seed)
        nan_TL = is_nan(self.keys_TE, experts_TL)
        bin_TL = self.of(experts_TL, competing_TL)
        return fill_bins(bin_TL, nan_TL, self.class_T, rank_TL, seats_B1)


def reroute(
    bins: Bins,
    topk_TK: Tensor,
    held_TK: Tensor,
    asked_T1: Tensor | None,
    local_TE: Tensor | None,
    seats_B1: Tensor,
) -> tuple[Tensor, Tensor]:
    """One round of giving, after Token Drop: int64 [T, M] experts, bool [T, M] who holds them.

    A token that lost l of its bids makes l more, for its best experts outside of the top-k whose
    bins have free seats; a bin gives these to the best of them. Nobody loses a seat.

    held_TK: who won a seat in Token Drop. asked_T1: bool [T, 1], who asked for one; None for all.
    seats_B1: seats per flat bin, those that are taken included.
    """
    lost_T = _known(_and(~held_TK, asked_T1)).sum(1)
    free_B1 = seats_B1 - bins.load(topk_TK, held_TK)
    experts_1E = torch.arange(bins.keys_TE.shape[1], device=topk_TK.device)[None]
    # In one group all rows see the same bins, those of padding too, which lost nothing.
    bin_TE = bins.of(experts_1E, None if bins.group_T is None else asked_T1)
    open_TE = _known(_and(free_B1[bin_TE] > 0, local_TE))
    extra_TM, exists_TM = extra_candidates(bins.keys_TE, topk_TK, bins.plan.extra, open_TE)
    place_M = torch.arange(bins.plan.extra, device=topk_TK.device)
    bids_TM = _known(_and(place_M < lost_T[:, None], exists_TM))
    return extra_TM, bins.fill(extra_TM, bids_TM, free_B1)


def _and(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Both masks; None is true everywhere."""
    if left is None or right is None:
        return left if right is None else right
    return left & right


def _known(mask: Tensor | None) -> Tensor:
    assert mask is not None
    return mask


def _column(mask_T: Tensor | None) -> Tensor | None:
    return None if mask_T is None else mask_T[:, None]


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
    prompt_T: Tensor | None,
    experts_TL: Tensor,
    held_TL: Tensor | None,
    is_topk_TL: Tensor | None,
    limit_GX: Tensor,
) -> Selection:
    """What each token holds, with weights, loads and counts.

    topk_TK: the model's choice, for the loads and the gate mass before. prompt_T: bool, the real
    tokens that are not decode; None for all rows. The held experts of a row move to the left
    in their order (best first); the first W stay, which is the cut by `max_experts`. held_TL None:
    all are held. is_topk_TL None: all are in the top-k.
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
    mass_TK = fixed_point(scores_TE.gather(1, topk_TK))
    if real_T is not None:
        mass_TK = mass_TK.where(real_T[:, None], 0)
    holds_TE = torch.zeros((T, E + 1), dtype=torch.bool, device=scores_TE.device)
    holds_TE.scatter_(1, experts_TW.where(experts_TW >= 0, E), True)
    prompts = topk_TK.new_full((), T) if prompt_T is None else prompt_T.sum()
    return Selection(
        experts=experts_TW.int(),
        weights=kept_weights(weights_TW, unused_TW, plan.renormalize).contiguous(),
        load_before=load_before_E.int(),
        load_after=load_after_E.int(),
        capacity=limit_GX,
        kept=kept,
        left_without=without_T.sum(),
        mass=mass_TK.sum(),
        lost=mass_TK.masked_fill(holds_TE.gather(1, topk_TK), 0).sum(),
        prompts=prompts,
    )


def _without_limit(
    plan: Plan,
    scores_TE: Tensor,
    models_TK: Tensor,
    topk_TK: Tensor,
    real_T: Tensor | None,
    prompt_T: Tensor | None,
    num_groups: int,
) -> Selection:
    """The step without any limit: the model's choice, with what decode tokens hold instead."""
    held_TK = None if real_T is None else real_T[:, None].expand_as(topk_TK)
    size = (num_groups, len(plan.bin_sizes))
    limit_GX = torch.full(size, NO_LIMIT, dtype=torch.int32, device=scores_TE.device)
    return pack_rows(plan, scores_TE, models_TK, real_T, prompt_T, topk_TK, held_TK, None, limit_GX)


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
    """Decode keep, then Token Drop, Expanded Drop or reroute, for the tokens of one step.

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
    is_plain = topk_TK is None
    models_TK = topk_TK = choose_top_k(keys_TE, k, topk_TK)
    prompt_T, decode_T = real_T, None
    if is_decode_T is not None:
        prompt_T, decode_T = _and(real_T, ~is_decode_T), _and(real_T, is_decode_T)
    if plan.keeps and decode_T is not None:
        topk_TK = share_experts(plan.keeps, keys_TE, models_TK, real_T, decode_T)

    # Steps in which no limit can be in effect, whatever the tensors hold.
    if plan.mode == "off" or plan.gamma is None or plan.min_tokens > T:
        return _without_limit(plan, scores_TE, models_TK, topk_TK, real_T, prompt_T, G)
    table, first_limited = capacity_table(plan, T, scores_TE.device)
    if first_limited > T:
        return _without_limit(plan, scores_TE, models_TK, topk_TK, real_T, prompt_T, G)

    # Capacity of each group. Padding rows are in a group of their own, number G.
    group_T = None
    if plan.scope == "request":
        assert request_T is not None
        group_T = request_T if real_T is None else request_T.where(real_T, G)
    count_G, limit_GX = group_limits(plan, table, T, real_T, prompt_T, group_T, G)
    index_T = token_index(T, real_T, group_T, count_G) if plan.metric == "random" else None
    class_T = None
    if plan.priority != "uniform":
        assert is_image_T is not None
        class_T = is_image_T if plan.priority == "image-first" else ~is_image_T
    bins = Bins(plan, keys_TE, device_E, group_T, G, index_T, class_T, seed)
    if plan.busiest:
        load_GB = bins.load(topk_TK, _column(real_T))[:-1].view(G, B)
        limit_GX = below_the_busiest(limit_GX, load_GB)

    # Seats of each bin. Decode tokens sit down first, with all they hold.
    seats_B1 = pad(limit_GX.long().expand(G, B).reshape(-1), (0, 1))
    if decode_T is not None:
        seats_B1 = (seats_B1 - bins.load(topk_TK, decode_T[:, None])).clamp_(min=0)

    # Candidates of each prompt token, best first. Every bin keeps its best.
    local_TE = None
    if plan.local:
        assert device_E is not None and token_device_T is not None
        local_TE = device_E == token_device_T[:, None]
    experts_TL, asks_TL, is_topk_TL = topk_TK, _column(prompt_T), None
    if plan.mode == "expanded" and plan.extra > 0:
        extra_TM, exists_TM = extra_candidates(keys_TE, topk_TK, plan.extra, local_TE)
        limited_T1 = limit_GX[:, :1] != NO_LIMIT
        if group_T is not None:
            limited_T1 = limited_T1[group_T.clamp(max=G - 1)]
        asks_TM = _known(_and(_and(limited_T1, _column(prompt_T)), exists_TM))
        experts_TL, is_topk_TL, asks_TL = join(topk_TK, extra_TM, asks_TL, asks_TM)
        if not is_plain:  # its experts need not be better than the extra ones
            experts_TL, is_topk_TL, asks_TL = in_order(keys_TE, experts_TL, is_topk_TL, asks_TL)
    held_TL = bins.fill(experts_TL, asks_TL, seats_B1)
    if plan.mode == "reroute" and plan.extra > 0:
        extra_TM, given_TM = reroute(bins, topk_TK, held_TL, asks_TL, local_TE, seats_B1)
        experts_TL, is_topk_TL, held_TL = join(topk_TK, extra_TM, held_TL, given_TM)
        if not is_plain:
            experts_TL, is_topk_TL, held_TL = in_order(keys_TE, experts_TL, is_topk_TL, held_TL)
    if decode_T is not None:
        held_TL = held_TL | _known(_and(decode_T[:, None], is_topk_TL))
    return pack_rows(
        plan, scores_TE, models_TK, real_T, prompt_T, experts_TL, held_TL, is_topk_TL, limit_GX
    )
