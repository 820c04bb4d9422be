"""What the routing kernels share: scores as integers, and bids. Letters: _routing_kernels.py."""

# Arguments of Triton kernels are pointers and blocks of the kernel language: no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from capmoe_kernels import contract

METRICS = ("score", "order", "reverse-order", "random")
"""What `bid_of` and `digits_of_bids` know; others they refuse at compile time."""

NO_LIMIT = tl.constexpr(contract.NO_LIMIT)
NONE = tl.constexpr(-(2**31))  # score key of what is no candidate: below all others
NAN_KEY = tl.constexpr(-(2**31) + 1)  # score key of NaN: below that of -inf
TOPK = tl.constexpr(2**16)  # a candidate is expert + TOPK * (is it of the top-k)
ALL_WIN = tl.constexpr(2**63 - 1)
NOBODY_WINS = tl.constexpr(-(2**63))  # no bid is this low


@triton.jit
def key_of_score(score):
    """int32 that rises with the float32 score: -0.0 is 0.0, NaN is less than -inf."""
    bits = score.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    key = tl.where(bits < 0, ~size, size)
    key = tl.where(size == 0, 0, key)
    return tl.where(size > 0x7F800000, NAN_KEY, key)


@triton.jit
def score_of_key(key):
    """The float32 score of a key."""
    bits = tl.where(key < 0, ~key | NONE, key)
    bits = tl.where(key == NAN_KEY, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def fixed_point(score):
    """int64: floor(S * 2^20) as `vllm_capmoe.ranking.fixed_point`: from 0 to 2^30, 0 for NaN."""
    score = tl.where(score > 0, tl.minimum(score, 1024.0), 0.0)
    return (score * 1048576.0).to(tl.int32).to(tl.int64)


@triton.jit
def fmix32(x):
    """`contract.fmix32` of uint32."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def bid_of(key, tag, token, expert, index, T, start, E: tl.constexpr, METRIC: tl.constexpr):
    """int64, lower is better: (is NaN, class, rank by metric, token, expert).

    Bit 63 is_nan, 62 class, 61..30 rank, 29..0 token * E + expert + 1; for the metrics of order,
    whose rank is in the last part, bit 31 is_nan, 30 class. The top bit is turned around, so that
    the order as signed numbers is that of the unsigned ones. No bid is NOBODY_WINS, since the last
    part is at least 1. start: fmix32(seed), index: the token's index, for metric random only.
    """
    head = tl.where(key == NAN_KEY, 2, 0) + ((tag >> 1) & 1)
    if METRIC == "reverse-order":
        token = T - 1 - token
    last = token * E + expert + 1
    if METRIC == "order" or METRIC == "reverse-order":
        bid = (head.to(tl.int64) << 30) | last
    else:
        if METRIC == "score":
            rank = 0x7FFFFFFF - key.to(tl.int64)
        else:
            tl.static_assert(METRIC == "random", "unknown metric")
            draw = fmix32(start.to(tl.uint32) + index.to(tl.uint32))
            rank = 0xFFFFFFFF - fmix32(draw + expert.to(tl.uint32)).to(tl.int64)
        bid = (head.to(tl.int64) << 62) | (rank << 30) | last
    return bid ^ NOBODY_WINS


@triton.jit
def digits_of_bids(METRIC: tl.constexpr):
    """How many of the low bits of bids differ, and an int64 with ones in all others."""
    if METRIC == "order" or METRIC == "reverse-order":
        return tl.full((), 32, tl.int64), tl.full((), -(2**32), tl.int64)
    else:
        tl.static_assert(METRIC == "score" or METRIC == "random", "unknown metric")
        return tl.full((), 64, tl.int64), tl.full((), 0, tl.int64)


@triton.jit
def wins_seat(
    asked, expert, is_topk, score, tag, t, index,
    device_ptr, last_bid_ptr, given_bid_ptr, T, start,
    E: tl.constexpr, B: tl.constexpr, METRIC: tl.constexpr,
):  # fmt: skip
    """Whether candidates, of those that ask, win a seat: their bid is at most the bin's last one.

    device_ptr: int [E] at level device, else None. last_bid_ptr: int64 [G, B]. given_bid_ptr: the
    same for those outside of the top-k, None where there is one for all. tag, t and index have the
    shape of the others, or broadcast to it.
    """
    bin_ = expert
    if device_ptr is not None:
        bin_ = tl.load(device_ptr + expert, mask=asked, other=-1).to(tl.int32)
        asked = asked & (bin_ >= 0) & (bin_ < B)
    at = tl.where(tag >= 0, tag >> 2, 0) * B + bin_
    if given_bid_ptr is None:
        last_bid = tl.load(last_bid_ptr + at, mask=asked, other=NOBODY_WINS)
    else:
        last_bid = tl.load(last_bid_ptr + at, mask=asked & is_topk, other=NOBODY_WINS)
        given_bid = tl.load(given_bid_ptr + at, mask=asked & ~is_topk, other=NOBODY_WINS)
        last_bid = tl.where(is_topk, last_bid, given_bid)
    bid = bid_of(key_of_score(score), tag, t, expert, index, T, start, E, METRIC)
    return asked & (bid <= last_bid)
