"""The routing kernel of decode keep: what decode tokens hold. Letters: _routing_kernels.py."""

# Arguments of Triton kernels are pointers and blocks of the kernel language: no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from capmoe_kernels._routing_bids import NONE, TOPK, fixed_point, score_of_key
from capmoe_kernels._routing_kernels import put_candidate
from capmoe_kernels._routing_limits import add_loads

OWN = tl.constexpr(1)  # of the model's choice; HELD with it, or instead of others of it
HELD = tl.constexpr(2)


@triton.jit(do_not_specialize=["T"])
def share_kernel(
    scores_ptr,  # as of choose_kernel
    scores_stride,
    tags_ptr,  # int32 [T]
    cand_ptr,  # int32 [L, T], rewritten for decode tokens, whose first K are their top-k
    cand_score_ptr,  # float32 [L, T], as cand_ptr
    keys_ptr,  # int32 [E, T], as cand_ptr; None where it isn't needed
    decode_keys_ptr,  # int32 [T, E], read for decode tokens
    loaded_ptr,  # int32 [E + 1]: 1 where an expert is loaded; then k0
    bin_device_ptr,  # int [E] at level device, None at level expert; for the next one
    bin_loads_ptr,  # int32 [1, B], added to: what decode tokens hold; None if nobody asks
    totals_ptr,  # int64 [5], of pack_kernel, which counts what is held for the model's choice
    T,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    SCORING: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """What the decode tokens of BLOCK_T rows hold: their k0 best, then the best loaded ones, then
    the rest of their own choice. Other rows stay as they are.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    tag = tl.load(tags_ptr + t, mask=t < T, other=-1)
    decode = (tag >= 0) & ((tag & 1) != 0)
    if tl.max(decode.to(tl.int32), 0) > 0:
        columns = tl.arange(0, EP)
        k0 = tl.load(loaded_ptr + E)
        loaded = tl.load(loaded_ptr + columns, mask=columns < E, other=0)
        mask = decode[:, None] & (columns < E)[None, :]
        at = decode_keys_ptr + t[:, None] * E + columns[None, :]
        keys = tl.load(at, mask=mask, other=NONE)

        state = tl.zeros((BLOCK_T, EP), tl.int32)
        for j in range(K):
            candidate = tl.load(cand_ptr + j * T + t, mask=decode, other=TOPK - 1)
            here = columns[None, :] == (candidate % TOPK)[:, None]
            state = tl.where(here, tl.where(j < k0, OWN | HELD, OWN), state)
        for _ in range(k0, K):
            pool = tl.where((loaded > 0)[None, :] & (state < HELD), keys, NONE)
            best, expert = tl.max(pool, 1, return_indices=True)
            own, own_expert = tl.max(tl.where(state == OWN, keys, NONE), 1, return_indices=True)
            expert = tl.where(best == NONE, own_expert, expert)
            state = tl.where(columns[None, :] == expert[:, None], state | HELD, state)

        if bin_loads_ptr is not None:
            held = (state >= HELD) & decode[:, None]
            add_loads(held, tag, columns, bin_device_ptr, bin_loads_ptr, E, B)
        mass = fixed_point(score_of_key(keys))
        lost = tl.sum(tl.sum(tl.where(state == OWN, mass, 0), 1), 0)
        gained = tl.sum(tl.sum(tl.where(state == HELD, mass, 0), 1), 0)
        tl.atomic_add(totals_ptr + 2, lost - gained, sem="relaxed")
        tl.atomic_add(totals_ptr + 3, lost, sem="relaxed")
        left = tl.where(state >= HELD, keys, NONE)
        if keys_ptr is not None:
            tl.store(keys_ptr + columns[None, :] * T + t[:, None], left, mask=mask)
        to = tl.where(decode, t, T)  # nothing is written of the others
        for j in range(K):
            best, expert = tl.max(left, 1, return_indices=True)
            put_candidate(
                j, best, expert, TOPK, to, T, scores_ptr, scores_stride, cand_ptr, cand_score_ptr,
                SCORING,
            )  # fmt: skip
            left = tl.where(columns[None, :] == expert[:, None], NONE, left)
