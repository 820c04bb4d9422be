"""The routing kernels of reroute: new bids for lost ones, and who wins a seat by them.

Letters: _routing_kernels.py. They run between `limit_kernel`, which says what seats are left, and
`pack_kernel`.
"""

# Arguments of Triton kernels are pointers and blocks of the kernel language: no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from capmoe_kernels._routing_bids import NO_LIMIT, NOBODY_WINS, NONE, TOPK, wins_seat
from capmoe_kernels._routing_kernels import put_candidate
from capmoe_kernels._routing_limits import bidders, find_group, last_winner


@triton.jit(do_not_specialize=["T", "start"])
def reroute_kernel(
    scores_ptr,  # as in choose_kernel
    scores_stride,
    tags_ptr,  # int32 [T]
    cand_ptr,  # int32 [K + M, T]: the first K are read, the others written
    cand_score_ptr,  # float32 [K + M, T], the same
    rest_ptr,  # int32 [E, T]: keys of what a token may be given; of what it bids for, where STORE
    device_ptr,  # int [E] at level device, None at level expert
    limits_ptr,  # int32 [G, X]
    last_bid_ptr,  # int64 [G, B]
    free_ptr,  # int32 [G, B]: the free seats of groups with a limit
    index_ptr,  # int32 [T], for metric random
    T,
    start,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    B: tl.constexpr,
    X: tl.constexpr,
    METRIC: tl.constexpr,
    SCORING: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A token that lost l of its bids makes l more, for its best other experts with free seats."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, EP)
    tag = tl.load(tags_ptr + t, mask=t < T, other=-1)
    group = tl.where(tag >= 0, tag >> 2, 0)
    limit = tl.load(limits_ptr + group * X, mask=tag >= 0, other=NO_LIMIT)
    competes = (limit != NO_LIMIT) & ((tag & 1) == 0)
    index = t
    if index_ptr is not None:
        index = tl.load(index_ptr + t, mask=competes, other=0)

    lost = tl.zeros((BLOCK_T,), tl.int32)
    for j in range(K):
        candidate = tl.load(cand_ptr + j * T + t, mask=competes, other=-1)
        asked = candidate >= 0
        expert = tl.where(asked, candidate % TOPK, 0)
        score = tl.load(cand_score_ptr + j * T + t, mask=asked, other=0.0)
        wins = wins_seat(
            asked, expert, asked, score, tag, t, index, device_ptr, last_bid_ptr, None, T, start,
            E, B, METRIC,
        )  # fmt: skip
        lost += tl.where(asked & ~wins, 1, 0)
    most = tl.minimum(tl.max(lost, 0), M)

    bin_ = columns
    inside = columns < E
    if device_ptr is not None:
        bin_ = tl.load(device_ptr + columns, mask=inside, other=-1).to(tl.int32)
        inside = inside & (bin_ >= 0) & (bin_ < B)
    mask = (lost > 0)[:, None] & inside[None, :]
    free = tl.load(free_ptr + group[:, None] * B + bin_[None, :], mask=mask, other=0)
    at = rest_ptr + columns[None, :] * T + t[:, None]
    left = tl.load(at, mask=mask & (free > 0), other=NONE)
    bids = tl.full((BLOCK_T, EP), NONE, tl.int32)
    for j in range(0, most):
        best, expert = tl.max(left, 1, return_indices=True)
        best = tl.where(j < lost, best, NONE)
        put_candidate(
            K + j, best, expert, 0, t, T, scores_ptr, scores_stride, cand_ptr, cand_score_ptr,
            SCORING,
        )  # fmt: skip
        here = columns[None, :] == expert[:, None]
        # Where nothing is left, the best of nothing is column 0: no bid, and no end of one.
        bids = tl.where(here & (best != NONE)[:, None], left, bids)
        left = tl.where(here, NONE, left)
    for j in range(most, M):
        tl.store(cand_ptr + (K + j) * T + t, tl.full((BLOCK_T,), -1, tl.int32), mask=t < T)
    if device_ptr is None:
        tl.store(at, bids, mask=(t < T)[:, None] & (columns < E)[None, :])


@triton.jit(do_not_specialize=["T", "G", "start", "least"])
def give_kernel(
    tags_ptr,  # int32 [T]
    cand_ptr,  # int32 [K + M, T]
    cand_score_ptr,  # float32 [K + M, T]
    bids_ptr,  # int32 [E, T] at level expert: the keys of what tokens bid for; None at level device
    device_ptr,  # int [E] at level device, None at level expert
    groups_ptr,  # int32 [4, G]
    limits_ptr,  # int32 [G, X]
    free_ptr,  # int32 [G, B]
    given_bid_ptr,  # int64 [G, B], written where the group has a limit
    T,
    G,
    start,
    least,
    E: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    B: tl.constexpr,
    X: tl.constexpr,
    METRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per bin, as in `limit_kernel`: the last of the new bids that wins a free seat."""
    bin_ = tl.program_id(0) % B
    group = find_group(tl.program_id(0) // B, least, groups_ptr, G, 128)
    limit = tl.load(limits_ptr + group * X, mask=group >= 0, other=NO_LIMIT)
    if limit != NO_LIMIT:
        seats = tl.load(free_ptr + group * B + bin_)
        given_bid = tl.full((), NOBODY_WINS, tl.int64)
        if seats > 0:
            begin = T - tl.load(groups_ptr + group)
            end = tl.load(groups_ptr + G + group)
            first_column = bin_ if bids_ptr is not None else K
            end_column = bin_ + 1 if bids_ptr is not None else K + M
            competing, _ = bidders(
                begin, end, first_column, end_column, group, bin_,
                tags_ptr, cand_ptr, cand_score_ptr, bids_ptr, device_ptr, T, start,
                E, METRIC, BLOCK,
            )  # fmt: skip
            given_bid = last_winner(
                seats, competing, begin, end, first_column, end_column, group, bin_,
                tags_ptr, cand_ptr, cand_score_ptr, bids_ptr, device_ptr, T, start,
                E, METRIC, BLOCK,
            )  # fmt: skip
        tl.store(given_bid_ptr + group * B + bin_, given_bid)
