"""Triton kernels of capacity-aware routing. `routing.py` is their public door and their contract.

Letters: T tokens (rows), E experts, K experts per token, M extra candidates, L = K + M candidates,
W places per token, G groups (1, or one per request), B bins per group (experts or devices),
X limits per group (1, or one per device), EP, LP, WP the powers of two at or above E, L, W.

    choose_kernel   rows of scores -> candidates of each token, best first; what a row is (tags)
    share_kernel    decode keep: decode tokens share what the step loads (_routing_sharing.py)
    limit_kernel    per bin: the limit, and the last bid that wins a seat (_routing_limits.py)
    reroute_kernel  of tokens that lost bids: new ones, where seats are free (_routing_reroute.py)
    give_kernel     per bin: the last of these that wins a free seat (_routing_reroute.py)
    pack_kernel     per row: who holds what, weights; loads, loads of each block of rows
    seats_kernel    the held assignments, expert by expert and by token within an expert; counters

The order in which candidates win the seats of a bin is that of one integer, the *bid*: lower is
better, all bids of a bin are different. So the C best of a bin are those whose bid is at most the
C-th lowest, and a bin needs one number to say who won. `limit_kernel` finds it digit by digit from
histograms (a radix select). Counts and maxima by integer atomics are the same in any order; where
an order matters, it comes from prefix sums over rows.

Rows are int32 numbers, as are their products with E, K, L or W: the public function holds T * E
below 2^30. Only the offset of a row of scores, which has a stride, is computed in int64.
"""

import triton
import triton.language as tl

from capmoe_kernels._routing_bids import (
    NO_LIMIT,
    NOBODY_WINS,
    NONE,
    TOPK,
    fixed_point,
    key_of_score,
    score_of_key,
    wins_seat,
)
from capmoe_kernels._routing_limits import add_loads

# --- Rows of the input ----------------------------------------------------------------------


@triton.jit
def score_rows(logits, columns, E: tl.constexpr, SCORING: tl.constexpr):
    """The scores of rows of router logits [BLOCK_T, EP], float32. Divisions are IEEE's."""
    if SCORING == "softmax":
        logits = tl.where(columns[None, :] < E, logits, float("-inf"))
        power = tl.exp(logits - tl.max(logits, 1)[:, None])
        power = tl.where(columns[None, :] < E, power, 0.0)  # of a row of -inf: NaN - as torch
        logits = tl.div_rn(power, tl.sum(power, 1)[:, None])
    elif SCORING == "sigmoid":
        logits = tl.div_rn(1.0, 1.0 + tl.exp(-logits))
    elif SCORING == "sqrtsoftplus":
        # log(1 + u) of u = exp(-|x|), exact to rounding for small u too: u * log(w) / (w - 1).
        u = tl.exp(-tl.abs(logits))
        w = 1.0 + u
        log1p = tl.where(w == 1.0, u, u * tl.div_rn(tl.log(w), tl.where(w == 1.0, 1.0, w - 1.0)))
        # A sum, not a maximum: NaN stays NaN.
        logits = tl.sqrt_rn(tl.where(logits > 0, logits, 0.0 * u) + log1p)
    else:
        tl.static_assert(SCORING == "none", "unknown scoring")
    return logits


@triton.jit
def tags_of(t, padding_ptr, decode_ptr, request_ptr, image_ptr, T, G, TEXT_LAST: tl.constexpr):
    """int32 tag of each row: group * 4 + class * 2 + is_decode, or -1 for padding.

    Class 1 is seated after class 0. A row whose request is not in [0, G) counts as padding.
    """
    real = (t >= 0) & (t < T)
    if padding_ptr is not None:
        real = real & (tl.load(padding_ptr + t, mask=real, other=1) == 0)
    tag = tl.zeros_like(t)
    if request_ptr is not None:
        group = tl.load(request_ptr + t, mask=real, other=-1)
        real = real & (group >= 0) & (group < G)
        tag = group.to(tl.int32) * 4
    if decode_ptr is not None:
        tag += (tl.load(decode_ptr + t, mask=real, other=0) != 0).to(tl.int32)
    if image_ptr is not None:
        is_image = tl.load(image_ptr + t, mask=real, other=0) != 0
        tag += tl.where(is_image != TEXT_LAST, 2, 0)
    return tl.where(real, tag, -1)


@triton.jit
def kept_by_each(keep_ptr, KEEPS: tl.constexpr, padding_ptr, decode_ptr, T):
    """k0, by the decode tokens of the whole step."""
    decodes = 0
    if KEEPS > 1:
        BLOCK: tl.constexpr = 1024
        for first in range(0, T, BLOCK):
            t = first + tl.arange(0, BLOCK)
            decode = tl.load(decode_ptr + t, mask=t < T, other=0) != 0
            if padding_ptr is not None:
                decode = decode & (tl.load(padding_ptr + t, mask=t < T, other=1) == 0)
            decodes += tl.sum(decode.to(tl.int32), 0)
    return tl.load(keep_ptr + tl.minimum(decodes, KEEPS - 1))


@triton.jit
def put_candidate(
    j, key, expert, topk_bit, t, T, scores_ptr, scores_stride, cand_ptr, cand_score_ptr, SCORING
):
    """Write column j of the candidates, [L, T]: the expert with its top-k bit or -1; the score.

    topk_bit: TOPK or 0.
    """
    exists = key != NONE
    if SCORING == "none":  # the bits as they came: -0.0 has the key of 0.0
        at = scores_ptr + t.to(tl.int64) * scores_stride + expert
        score = tl.load(at, mask=exists, other=0.0).to(tl.float32)
    else:
        score = tl.where(exists, score_of_key(key), 0.0)
    inside = t < T
    candidate = tl.where(exists, expert + topk_bit, -1)
    tl.store(cand_ptr + j * T + t, candidate, mask=inside)
    tl.store(cand_score_ptr + j * T + t, score, mask=inside)


@triton.jit(do_not_specialize=["T", "G"])
def choose_kernel(
    scores_ptr,  # float [T, E], last stride 1: scores, or logits where SCORING is not "none"
    scores_stride,
    topk_ptr,  # int [T, K], last stride 1, or None: the plain top-k
    topk_stride,
    padding_ptr,  # uint8 [T] or None; so the next one and image_ptr
    decode_ptr,
    request_ptr,  # int [T] or None
    image_ptr,
    device_ptr,  # int [E], for local candidates; None otherwise
    token_device_ptr,  # int [T], as device_ptr
    cand_ptr,  # int32 [L, T]
    cand_score_ptr,  # float32 [L, T]
    keys_ptr,  # int32 [E, T], NONE for what is no candidate; None where it isn't needed
    tags_ptr,  # int32 [T]
    groups_ptr,  # int32 [4, G], zeros: T - first row, last row + 1, tokens, prompt tokens; or None
    load_before_ptr,  # int32 [E], zeros
    keep_ptr,  # int32 [KEEPS]: k0 by the number of decode tokens; None without decode keep
    loaded_ptr,  # int32 [E + 1], zeros, as keep_ptr: written 1 where an expert is loaded; then k0
    decode_keys_ptr,  # int32 [T, E], as keep_ptr: the score keys of decode tokens
    rest_ptr,  # int32 [E, T] for reroute: keys of what a prompt token may be given, else NONE; None
    bin_device_ptr,  # int [E] at level device, None at level expert; for the next one
    bin_loads_ptr,  # int32 [G, B], zeros: the top-k assignments of each bin; None if nobody asks
    T,
    G,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    KEEPS: tl.constexpr,
    B: tl.constexpr,
    TEXT_LAST: tl.constexpr,
    SCORING: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Candidates of BLOCK_T tokens: the top-k, and the M best others that a prompt token may take.

    Each round takes the best expert that is left, the lower one of equals.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, EP)
    tag = tags_of(t, padding_ptr, decode_ptr, request_ptr, image_ptr, T, G, TEXT_LAST)
    real = tag >= 0
    tl.store(tags_ptr + t, tag, mask=t < T)

    mask = real[:, None] & (columns < E)[None, :]
    at = scores_ptr + t.to(tl.int64)[:, None] * scores_stride + columns[None, :]
    scores = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    scores = score_rows(scores, columns, E, SCORING)
    keys = tl.where(mask, key_of_score(scores), NONE)

    k0 = K
    if keep_ptr is not None:
        k0 = kept_by_each(keep_ptr, KEEPS, padding_ptr, decode_ptr, T)
    last_key = tl.full((BLOCK_T,), NONE, tl.int32)  # the k0-th best of the top-k
    last_expert = tl.full((BLOCK_T,), EP, tl.int32)

    rest = keys
    for j in range(K):
        if topk_ptr is None:
            best, expert = tl.max(rest, 1, return_indices=True)
            last_key = tl.where(j == k0 - 1, best, last_key)
            last_expert = tl.where(j == k0 - 1, expert, last_expert)
            put_candidate(
                j, best, expert, TOPK, t, T, scores_ptr, scores_stride, cand_ptr, cand_score_ptr,
                SCORING,
            )  # fmt: skip
        else:
            chosen = tl.load(topk_ptr + t.to(tl.int64) * topk_stride + j, mask=real, other=0)
            expert = tl.minimum(tl.maximum(chosen, 0), E - 1).to(tl.int32)
        rest = tl.where(columns[None, :] == expert[:, None], NONE, rest)
    is_topk = (keys != NONE) & (rest == NONE)
    # Words, not flags: of sums and maxima of single bits Triton 3.8 makes bit strings, and with
    # them a stack.
    topk_bits = tl.where(is_topk, TOPK, 0)
    count = tl.sum(topk_bits, 0) // TOPK
    tl.atomic_add(load_before_ptr + columns, count, mask=count > 0, sem="relaxed")

    if bin_loads_ptr is not None:
        counted = is_topk
        if keep_ptr is not None:  # share_kernel counts what decode tokens hold
            counted = is_topk & ((tag & 1) == 0)[:, None]
        add_loads(counted, tag, columns, bin_device_ptr, bin_loads_ptr, E, B)

    is_candidate = is_topk
    if M > 0 or rest_ptr is not None:
        prompt = real & ((tag & 1) == 0)
        pool = tl.where(prompt[:, None], rest, NONE)
        if token_device_ptr is not None:
            device = tl.load(device_ptr + columns, mask=columns < E, other=-1)
            token_device = tl.load(token_device_ptr + t, mask=real, other=-2)
            pool = tl.where(device[None, :] == token_device[:, None], pool, NONE)
        if rest_ptr is not None:
            mask = (t < T)[:, None] & (columns < E)[None, :]
            tl.store(rest_ptr + columns[None, :] * T + t[:, None], pool, mask=mask)
        left = pool
        for j in range(M):
            best, expert = tl.max(left, 1, return_indices=True)
            if topk_ptr is None:
                put_candidate(
                    K + j, best, expert, 0, t, T, scores_ptr, scores_stride, cand_ptr,
                    cand_score_ptr, SCORING,
                )  # fmt: skip
            left = tl.where(columns[None, :] == expert[:, None], NONE, left)
        is_candidate = is_topk | ((pool != NONE) & (left == NONE))

    if topk_ptr is not None:  # its experts need not be the best ones: all candidates by score
        left = tl.where(is_candidate, keys, NONE)
        for j in range(K + M):
            best, expert = tl.max(left, 1, return_indices=True)
            here = columns[None, :] == expert[:, None]
            bit = tl.max(tl.where(here, topk_bits, 0), 1)
            last_key = tl.where(j == k0 - 1, best, last_key)
            last_expert = tl.where(j == k0 - 1, expert, last_expert)
            put_candidate(
                j, best, expert, bit, t, T, scores_ptr, scores_stride, cand_ptr, cand_score_ptr,
                SCORING,
            )  # fmt: skip
            left = tl.where(here, NONE, left)

    if keys_ptr is not None:
        mask = (t < T)[:, None] & (columns < E)[None, :]
        at = keys_ptr + columns[None, :] * T + t[:, None]
        tl.store(at, tl.where(is_candidate, keys, NONE), mask=mask)

    if keep_ptr is not None:
        decode = real & ((tag & 1) != 0)
        at_least = (keys > last_key[:, None]) | (
            (keys == last_key[:, None]) & (columns[None, :] <= last_expert[:, None])
        )
        loads = is_topk & (at_least | ~decode[:, None])
        count = tl.sum(tl.where(loads, 1, 0), 0)
        tl.store(loaded_ptr + columns, tl.full((EP,), 1, tl.int32), mask=count > 0)
        tl.store(loaded_ptr + E, k0)
        at = decode_keys_ptr + t[:, None] * E + columns[None, :]
        tl.store(at, keys, mask=decode[:, None] & (columns < E)[None, :])

    if groups_ptr is not None:
        # A run: neighbouring rows of one group, all prompt or all decode. Its tokens are its end
        # less its start, so its two ends count for all of it, and the sums are exact in any order.
        before = tags_of(t - 1, padding_ptr, decode_ptr, request_ptr, image_ptr, T, G, TEXT_LAST)
        after = tags_of(t + 1, padding_ptr, decode_ptr, request_ptr, image_ptr, T, G, TEXT_LAST)
        starts = real & ((tag & -3) != (before & -3))
        ends = real & ((tag & -3) != (after & -3))
        at = groups_ptr + tl.where(real, tag >> 2, 0)
        tl.atomic_max(at, T - t, mask=starts, sem="relaxed")
        tl.atomic_max(at + G, t + 1, mask=ends, sem="relaxed")
        tl.atomic_add(at + 2 * G, -t, mask=starts, sem="relaxed")
        tl.atomic_add(at + 2 * G, t + 1, mask=ends, sem="relaxed")
        prompt = (tag & 1) == 0
        tl.atomic_add(at + 3 * G, -t, mask=starts & prompt, sem="relaxed")
        tl.atomic_add(at + 3 * G, t + 1, mask=ends & prompt, sem="relaxed")


# --- Rows of the result ---------------------------------------------------------------------


@triton.jit
def places_by_score(held, score, expert, W: tl.constexpr):
    """int32: the place of each held candidate in its row, the best first; W for the others."""
    order = (key_of_score(score).to(tl.int64) << 16) - expert
    left = tl.where(held, order, NOBODY_WINS)
    place = tl.full(held.shape, W, tl.int32)
    for w in range(W):
        here = (left == tl.max(left, 1)[:, None]) & (left != NOBODY_WINS)
        place = tl.where(here, w, place)
        left = tl.where(here, NOBODY_WINS, left)
    return place


@triton.jit(do_not_specialize=["T", "G", "start"])
def pack_kernel(
    tags_ptr,  # int32 [T]
    cand_ptr,  # int32 [L, T]
    cand_score_ptr,  # float32 [L, T]
    device_ptr,  # int [E] at level device, None at level expert
    limits_ptr,  # int32 [G, X]; written where not LIMITED
    last_bid_ptr,  # int64 [G, B], for LIMITED
    given_bid_ptr,  # int64 [G, B], for what reroute gives; or None
    index_ptr,  # int32 [T], for metric random
    experts_ptr,  # int32 [T, W], written
    weights_ptr,  # float32 [T, W], written
    counts_ptr,  # int32 [blocks, E], written: loads of this block of rows
    load_after_ptr,  # int32 [E], zeros
    totals_ptr,  # int64 [5], added to: kept, left_without, mass, lost, prompts (Selection)
    T,
    G,
    start,
    E: tl.constexpr,
    EP: tl.constexpr,
    L: tl.constexpr,
    LP: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    B: tl.constexpr,
    X: tl.constexpr,
    METRIC: tl.constexpr,
    LIMITED: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SORT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The rows of the result, ROWS tokens per program: held candidates move to the left.

    Candidates stand by score, but for SORT: then what is held is put in order.
    """
    block = tl.program_id(0)
    j = tl.arange(0, LP)
    places = tl.arange(0, WP)
    loads = tl.zeros((EP,), tl.int32)
    kept = tl.full((), 0, tl.int64)
    without = tl.full((), 0, tl.int64)
    mass = tl.full((), 0, tl.int64)
    lost = tl.full((), 0, tl.int64)
    prompts = tl.full((), 0, tl.int64)
    for row in range(block * ROWS, tl.minimum(block * ROWS + ROWS, T), BLOCK_T):
        t = row + tl.arange(0, BLOCK_T)
        inside = t < T
        tag = tl.load(tags_ptr + t, mask=inside, other=-1)
        at = j[None, :] * T + t[:, None]
        candidate = tl.load(cand_ptr + at, mask=inside[:, None] & (j < L)[None, :], other=-1)
        exists = candidate >= 0
        expert = tl.where(exists, candidate % TOPK, 0)
        is_topk = exists & (candidate >= TOPK)
        score = tl.load(cand_score_ptr + at, mask=exists, other=0.0)

        held = is_topk
        if LIMITED:
            group = tl.where(tag >= 0, tag >> 2, 0)
            limit = tl.load(limits_ptr + group * X, mask=tag >= 0, other=NO_LIMIT)
            competes = (limit != NO_LIMIT) & ((tag & 1) == 0)
            index = t
            if index_ptr is not None:
                index = tl.load(index_ptr + t, mask=competes, other=0)
            wins = wins_seat(
                exists & competes[:, None], expert, is_topk, score, tag[:, None], t[:, None],
                index[:, None], device_ptr, last_bid_ptr, given_bid_ptr, T, start, E, B, METRIC,
            )  # fmt: skip
            held = tl.where(competes[:, None], wins, is_topk)

        place = tl.cumsum(held.to(tl.int32), 1) - 1
        if SORT:
            place = places_by_score(held, score, expert, W)
        held = held & (place < W)
        holds = tl.sum(held.to(tl.int32), 1)
        weight = score
        if RENORMALIZE:
            total = tl.zeros((BLOCK_T,), tl.float32)
            for w in range(W):  # in the order of the row: each sum picks one number
                total += tl.sum(tl.where(held & (place == w), score, 0.0), 1)
            total = tl.where(total == 0, 1.0, total)
            weight = tl.div_rn(score, tl.broadcast_to(total[:, None], (BLOCK_T, LP)))
        at = t[:, None] * W + place
        tl.store(experts_ptr + at, expert, mask=held)
        tl.store(weights_ptr + at, weight, mask=held)
        at = t[:, None] * W + places[None, :]
        unused = inside[:, None] & (places < W)[None, :] & (places[None, :] >= holds[:, None])
        tl.store(experts_ptr + at, tl.full((BLOCK_T, WP), -1, tl.int32), mask=unused)
        tl.store(weights_ptr + at, tl.zeros((BLOCK_T, WP), tl.float32), mask=unused)

        flat = tl.reshape(expert, (BLOCK_T * LP,))
        loads += tl.histogram(flat, EP, mask=tl.reshape(held, (BLOCK_T * LP,)))
        kept += tl.sum(tl.sum((held & is_topk).to(tl.int32), 1), 0)
        without += tl.sum(((tag >= 0) & (holds == 0)).to(tl.int32), 0)
        own = tl.where(is_topk, fixed_point(score), 0)
        mass += tl.sum(tl.sum(own, 1), 0)
        lost += tl.sum(tl.sum(tl.where(held, 0, own), 1), 0)
        prompts += tl.sum(((tag >= 0) & ((tag & 1) == 0)).to(tl.int32), 0)

    e = tl.arange(0, EP)
    tl.store(counts_ptr + block * E + e, loads, mask=e < E)
    tl.atomic_add(load_after_ptr + e, loads, mask=loads > 0, sem="relaxed")
    tl.atomic_add(totals_ptr, kept, sem="relaxed")
    tl.atomic_add(totals_ptr + 1, without, sem="relaxed")
    tl.atomic_add(totals_ptr + 2, mass, sem="relaxed")
    tl.atomic_add(totals_ptr + 3, lost, sem="relaxed")
    tl.atomic_add(totals_ptr + 4, prompts, sem="relaxed")
    if not LIMITED:
        SHARE: tl.constexpr = 128
        for first in range(block * SHARE, G * X, tl.num_programs(0) * SHARE):
            at = first + tl.arange(0, SHARE)
            tl.store(limits_ptr + at, tl.full((SHARE,), NO_LIMIT, tl.int32), mask=at < G * X)


@triton.jit
def add_at(pointer, value):
    tl.store(pointer, tl.load(pointer) + value)


@triton.jit
def count_step(counters_ptr, before, after, totals_ptr, E: tl.constexpr, EP: tl.constexpr):
    """Add a step to the counters of `routing.route_triton`, in the order of `contract.COUNTERS`.

    before, after: loads int32 [EP]. totals_ptr: int64 [5], of pack_kernel.
    """
    e = tl.arange(0, EP)
    for row in tl.static_range(2):
        at = counters_ptr + row * E + e
        total = tl.load(at, mask=e < E, other=0)
        tl.store(at, total + (before if row == 0 else after), mask=e < E)
    totals = counters_ptr + 2 * E
    kept = tl.load(totals_ptr)
    asked = tl.sum(before, 0)
    add_at(totals, (asked > 0).to(tl.int64))
    add_at(totals + 1, asked - kept)
    add_at(totals + 2, tl.sum(after, 0) - kept)
    add_at(totals + 3, tl.load(totals_ptr + 1))
    add_at(totals + 4, tl.max(before, 0))
    add_at(totals + 5, tl.max(after, 0))
    add_at(totals + 6, tl.load(totals_ptr + 2))
    add_at(totals + 7, tl.load(totals_ptr + 3))
    is_prompt = (tl.load(totals_ptr + 4) > 0).to(tl.int64)
    add_at(totals + 8, is_prompt)
    active = totals + 11 - 2 * is_prompt  # before and after, of one kind of step
    add_at(active, tl.sum((before > 0).to(tl.int32), 0))
    add_at(active + 1, tl.sum((after > 0).to(tl.int32), 0))


@triton.jit(do_not_specialize=["T"])
def seats_kernel(
    experts_ptr,  # int32 [T, W]
    counts_ptr,  # int32 [blocks, E]
    loads_ptr,  # int32 [E]
    load_before_ptr,  # int32 [E]
    totals_ptr,  # int64 [5], of pack_kernel
    order_ptr,  # int32 [T * W], written
    offsets_ptr,  # int32 [E + 1], written
    seat_ptr,  # int32 [T, W], written
    counters_ptr,  # int64 [2 * E + 13], added to; or None
    T,
    E: tl.constexpr,
    EP: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Seats of ROWS tokens, after those of lower experts and, of an expert, of lower tokens."""
    block = tl.program_id(0)
    e = tl.arange(0, EP)
    loads = tl.load(loads_ptr + e, mask=e < E, other=0)
    ends = tl.cumsum(loads, 0)
    total = tl.sum(loads, 0)
    if block == 0:
        tl.store(offsets_ptr, 0)
        tl.store(offsets_ptr + 1 + e, ends, mask=e < E)
        if counters_ptr is not None:
            asked = tl.load(load_before_ptr + e, mask=e < E, other=0)
            count_step(counters_ptr, asked, loads, totals_ptr, E, EP)

    before = tl.zeros((EP,), tl.int32)
    for first in range(0, block, CHUNK):
        b = first + tl.arange(0, CHUNK)
        mask = (b < block)[:, None] & (e < E)[None, :]
        before += tl.sum(tl.load(counts_ptr + b[:, None] * E + e[None, :], mask=mask, other=0), 0)
    seat = ends - loads + before  # the next one of each expert
    # Empty places of the rows before this block come first among the empty ends of `order`.
    empty = total + block * ROWS * W - tl.sum(before, 0)

    places = tl.arange(0, WP)
    for row in range(block * ROWS, tl.minimum(block * ROWS + ROWS, T), BLOCK_T):
        t = row + tl.arange(0, BLOCK_T)
        inside = t < T
        place = tl.full((BLOCK_T, EP), -1, tl.int32)
        for w in range(W):
            expert = tl.load(experts_ptr + t * W + w, mask=inside, other=-1)
            place = tl.where(expert[:, None] == e[None, :], w, place)
        held = place >= 0
        mine = seat[None, :] + tl.cumsum(held.to(tl.int32), 0) - 1
        assignment = t[:, None] * W + place
        tl.store(order_ptr + mine, assignment, mask=held)
        tl.store(seat_ptr + assignment, mine, mask=held)
        seat += tl.sum(held.to(tl.int32), 0)

        mask = inside[:, None] & (places < W)[None, :]
        at = t[:, None] * W + places[None, :]
        free = mask & (tl.load(experts_ptr + at, mask=mask, other=0) < 0)
        tl.store(seat_ptr + at, tl.full((BLOCK_T, WP), -1, tl.int32), mask=free)
        frees = tl.sum(free.to(tl.int32), 1)
        after = empty + tl.cumsum(frees, 0)  # of each row
        # Held places stand to the left, so the free ones are numbered from the right.
        at = order_ptr + (after[:, None] - (W - places)[None, :])
        tl.store(at, tl.full((BLOCK_T, WP), -1, tl.int32), mask=free)
        empty += tl.sum(frees, 0)
