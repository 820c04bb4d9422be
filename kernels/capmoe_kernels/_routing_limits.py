"""The routing kernel of the limits: who wins a bin's seats. Letters: _routing_kernels.py."""

# Arguments of Triton kernels are pointers and blocks of the kernel language: no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from capmoe_kernels._routing_bids import (
    ALL_WIN,
    NO_LIMIT,
    NOBODY_WINS,
    NONE,
    TOPK,
    bid_of,
    digits_of_bids,
    key_of_score,
)


@triton.jit
def add_loads(counted, tag, columns, device_ptr, loads_ptr, E: tl.constexpr, B: tl.constexpr):
    """Count assignments [BLOCK_T, EP] of rows in int32 [G, B], by group and bin."""
    bin_ = columns
    inside = columns < E
    if device_ptr is not None:
        bin_ = tl.load(device_ptr + columns, mask=inside, other=-1).to(tl.int32)
        inside = inside & (bin_ >= 0) & (bin_ < B)
    group = tag >> 2
    first = tl.min(tl.where(tag >= 0, group, NO_LIMIT), 0)
    last = tl.max(tl.where(tag >= 0, group, -1), 0)
    ones = tl.where(counted, 1, 0)
    if first == last:  # all of one group, as most blocks are: one addition for each expert
        count = tl.sum(ones, 0)
        at = loads_ptr + first * B + bin_
        tl.atomic_add(at, count, mask=inside & (count > 0), sem="relaxed")
    elif first < last:
        at = loads_ptr + group[:, None] * B + bin_[None, :]
        tl.atomic_add(at, ones, mask=counted & inside[None, :], sem="relaxed")


@triton.jit
def bids_of_block(
    t, end, column, group, bin_, index_base,
    tags_ptr, cand_ptr, cand_score_ptr, keys_ptr, device_ptr, T, start,
    E: tl.constexpr, METRIC: tl.constexpr,
):  # fmt: skip
    """Of the candidates of a bin in one column and block of rows: bids, who competes, who is
    seated first (decode tokens); and the token index of the next block's first token.
    """
    tag = tl.load(tags_ptr + t, mask=t < end, other=-1)
    member = (tag >> 2) == group
    if keys_ptr is not None:  # one expert is one column
        expert = tl.zeros_like(t) + column
        key = tl.load(keys_ptr + column * T + t, mask=member, other=NONE)
    else:  # a device's experts may stand in any column of the candidates
        candidate = tl.load(cand_ptr + column * T + t, mask=member, other=-1)
        member = member & (candidate >= 0)
        expert = tl.where(member, candidate % TOPK, 0)
        member = member & (tl.load(device_ptr + expert, mask=member, other=-1) == bin_)
        score = tl.load(cand_score_ptr + column * T + t, mask=member, other=0.0)
        key = tl.where(member, key_of_score(score), NONE)
    index = t
    if METRIC == "random":
        of_group = ((tag >> 2) == group).to(tl.int32)
        index = index_base + tl.cumsum(of_group, 0) - 1
        index_base += tl.sum(of_group, 0)
    bid = bid_of(key, tag, t, expert, index, T, start, E, METRIC)
    candidates = key != NONE
    decode = candidates & ((tag & 1) != 0)
    return bid, candidates & ((tag & 1) == 0), decode, index_base


@triton.jit
def bidders(
    begin, end, first_column, end_column, group, bin_,
    tags_ptr, cand_ptr, cand_score_ptr, keys_ptr, device_ptr, T, start,
    E: tl.constexpr, METRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many compete for the seats of a bin, and how many are seated before (decode tokens)."""
    competing = 0
    seated = 0
    for column in range(first_column, end_column):
        base = 0
        for row in range(begin, end, BLOCK):
            t = row + tl.arange(0, BLOCK)
            bid, competes, decode, base = bids_of_block(
                t, end, column, group, bin_, base,
                tags_ptr, cand_ptr, cand_score_ptr, keys_ptr, device_ptr, T, start,
                E, METRIC,
            )  # fmt: skip
            competing += tl.sum(competes.to(tl.int32), 0)
            seated += tl.sum(decode.to(tl.int32), 0)
    return competing, seated


@triton.jit
def last_winner(
    seats, competing, begin, end, first_column, end_column, group, bin_,
    tags_ptr, cand_ptr, cand_score_ptr, keys_ptr, device_ptr, T, start,
    E: tl.constexpr, METRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last bid that wins a seat of a bin: the `seats`-th lowest of those that compete."""
    last_bid = tl.full((), ALL_WIN, tl.int64)
    if seats <= 0:
        last_bid = tl.full((), NOBODY_WINS, tl.int64)
    elif competing > seats:
        # Digit by digit from the top: `prefix` is what is known of the last bid, `known`
        # has ones there, and `wanted` of the `within` bids with that prefix still win.
        prefix = tl.full((), 0, tl.int64)
        shift, known = digits_of_bids(METRIC)
        wanted = seats
        within = competing
        digits = tl.arange(0, 256)
        # At the last digit a prefix is one bid, so `wanted` is `within`. Whatever memory
        # says, the loop ends there.
        while (wanted != within) & (shift > 0):
            shift -= 8
            histogram = tl.zeros((256,), tl.int32)
            for column in range(first_column, end_column):
                base = 0
                for row in range(begin, end, BLOCK):
                    t = row + tl.arange(0, BLOCK)
                    bid, competes, decode, base = bids_of_block(
                        t, end, column, group, bin_, base,
                        tags_ptr, cand_ptr, cand_score_ptr, keys_ptr, device_ptr, T, start,
                        E, METRIC,
                    )  # fmt: skip
                    bid = bid ^ NOBODY_WINS
                    competes = competes & ((bid & known) == prefix)
                    digit = ((bid >> shift) & 255).to(tl.int32)
                    histogram += tl.histogram(digit, 256, mask=competes)
            up_to = tl.cumsum(histogram, 0)
            lower = up_to < wanted
            digit = tl.sum(lower.to(tl.int32), 0)
            wanted -= tl.max(tl.where(lower, up_to, 0), 0)
            within = tl.sum(tl.where(digits == digit, histogram, 0), 0)
            prefix |= digit.to(tl.int64) << shift
            known |= tl.full((), 255, tl.int64) << shift
        last_bid = (prefix | ~known) ^ NOBODY_WINS
    return last_bid


@triton.jit
def find_group(nth, least, groups_ptr, G, BLOCK: tl.constexpr):
    """The nth group (from 0) of at least `least` tokens with a prompt token among them, or -1."""
    found = -1
    seen = 0
    for first in range(0, G, BLOCK):
        g = first + tl.arange(0, BLOCK)
        tokens = tl.load(groups_ptr + 2 * G + g, mask=g < G, other=0)
        prompts = tl.load(groups_ptr + 3 * G + g, mask=g < G, other=0)
        fits = (tokens >= least) & (prompts > 0)
        place = seen + tl.cumsum(fits.to(tl.int32), 0)
        found = tl.maximum(found, tl.max(tl.where(fits & (place == nth + 1), g, -1), 0))
        seen += tl.sum(fits.to(tl.int32), 0)
    return found


@triton.jit
def limits_of(g, x, mask, table_ptr, groups_ptr, min_tokens, G, X: tl.constexpr):
    """The limits of groups g: a look-up by their tokens, or NO_LIMIT."""
    tokens = tl.load(groups_ptr + 2 * G + g, mask=mask, other=0)
    prompts = tl.load(groups_ptr + 3 * G + g, mask=mask, other=0)
    limit = tl.load(table_ptr + tokens * X + x, mask=mask, other=NO_LIMIT)
    return tl.where((prompts > 0) & (tokens >= min_tokens), limit, NO_LIMIT)


@triton.jit(do_not_specialize=["T", "G", "start", "min_tokens", "least"])
def limit_kernel(
    tags_ptr,  # int32 [T]
    cand_ptr,  # int32 [L, T]
    cand_score_ptr,  # float32 [L, T]
    keys_ptr,  # int32 [E, T] at level expert, None at level device
    device_ptr,  # int [E] at level device, None at level expert
    groups_ptr,  # int32 [4, G]
    table_ptr,  # int32 [at least T + 1, X]: limits by the tokens of a group
    limits_ptr,  # int32 [G, X], written
    last_bid_ptr,  # int64 [G, B], written where the group has a limit
    bin_loads_ptr,  # int32 [G, B]: no limit is above the largest of its group; None: as it is
    free_ptr,  # int32 [G, B], written as last_bid_ptr: seats that stay free; None if nobody asks
    index_ptr,  # int32 [T], written for tokens of groups with a limit; None unless metric random
    T,
    G,
    start,  # fmix32(seed) as int32
    min_tokens,
    least,  # no group of fewer tokens has a limit
    E: tl.constexpr,
    L: tl.constexpr,
    B: tl.constexpr,
    X: tl.constexpr,
    METRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per bin of each group that may have a limit: the last bid that wins a seat.

    The grid is [Q * B], Q groups of at least `least` tokens being the most that T tokens give.
    Each program looks at the rows from its group's first to its last one, which are its own where
    the rows of a request are neighbours, as they are in vLLM.
    """
    pid = tl.program_id(0)
    # All programs together: the groups without a limit.
    SHARE: tl.constexpr = 128
    for first in range(pid * SHARE, G * X, tl.num_programs(0) * SHARE):
        at = first + tl.arange(0, SHARE)
        mask = at < G * X
        limit = limits_of(at // X, at % X, mask, table_ptr, groups_ptr, min_tokens, G, X)
        tl.store(limits_ptr + at, limit, mask=mask & (limit == NO_LIMIT))

    bin_ = pid % B
    group = find_group(pid // B, least, groups_ptr, G, SHARE)
    if group >= 0:
        x = bin_ if X > 1 else 0
        limit = limits_of(group, x, True, table_ptr, groups_ptr, min_tokens, G, X)
        if limit != NO_LIMIT:
            if bin_loads_ptr is not None:
                busiest = 0
                for first in range(0, B, SHARE):
                    b = first + tl.arange(0, SHARE)
                    load = tl.load(bin_loads_ptr + group * B + b, mask=b < B, other=0)
                    busiest = tl.maximum(busiest, tl.max(load, 0))
                limit = tl.minimum(limit, busiest)
            if bin_ == x:
                tl.store(limits_ptr + group * X + x, limit)
            begin = T - tl.load(groups_ptr + group)
            end = tl.load(groups_ptr + G + group)
            first_column = bin_ if keys_ptr is not None else 0
            end_column = bin_ + 1 if keys_ptr is not None else L

            if index_ptr is not None and bin_ == 0:
                seen = 0
                for row in range(begin, end, BLOCK):
                    t = row + tl.arange(0, BLOCK)
                    tag = tl.load(tags_ptr + t, mask=t < end, other=-1)
                    member = (tag >> 2) == group
                    index = seen + tl.cumsum(member.to(tl.int32), 0) - 1
                    tl.store(index_ptr + t, index, mask=member)
                    seen += tl.sum(member.to(tl.int32), 0)

            # Seats that decode tokens leave, and how many compete for them.
            competing, decode = bidders(
                begin, end, first_column, end_column, group, bin_,
                tags_ptr, cand_ptr, cand_score_ptr, keys_ptr, device_ptr, T, start,
                E, METRIC, BLOCK,
            )  # fmt: skip
            seats = limit - decode
            last_bid = last_winner(
                seats, competing, begin, end, first_column, end_column, group, bin_,
                tags_ptr, cand_ptr, cand_score_ptr, keys_ptr, device_ptr, T, start,
                E, METRIC, BLOCK,
            )  # fmt: skip
            if free_ptr is not None:
                tl.store(free_ptr + group * B + bin_, tl.maximum(seats - competing, 0))
            tl.store(last_bid_ptr + group * B + bin_, last_bid)
