"""Triton kernels that make seats from the experts of the places alone. Launched by seats.py.

Letters: A assignments (place w of token t is a = t*W + w), G experts of the layer, E experts here,
B experts of one program (a power of two), S assignments, or blocks, of one step. A block is `span`
assignments; a program has one block and B of the E experts.

    count_kernel   loads of each block of assignments, and of all
    place_kernel   order and offsets: a seat is the loads of lower experts, plus those of its own
                   expert in earlier blocks, plus the assignments of its expert before it in its own

Loads of all are added up by integer atomics, which give the same in any order; every position comes
from prefix sums over assignments. So the result repeats bitwise, whatever the experts are: an
expert may stand in a row twice, and ids that name no expert here count as none.

Assignments are int32 numbers, as are their products: see what seats.py refuses.
"""

# Arguments of Triton kernels are pointers and blocks of the kernel language: no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl


@triton.jit
def experts_here(experts_ptr, map_ptr, a, inside, G, E: tl.constexpr):
    """The experts here of the assignments `a` where `inside`, int32; -1 where there is none."""
    expert = tl.load(experts_ptr + a, mask=inside, other=-1)
    if map_ptr is not None:
        expert = tl.load(map_ptr + expert, mask=(expert >= 0) & (expert < G), other=-1)
    return tl.where((expert >= 0) & (expert < E), expert, -1).to(tl.int32)


@triton.jit(do_not_specialize=["A", "G", "span"])
def count_kernel(
    experts_ptr,  # int32 or int64 [A]
    map_ptr,  # int32 [G], or None: ids are those of the experts here
    counts_ptr,  # int32 [blocks, E], written: loads of each block
    loads_ptr,  # int32 [E], zeros: loads of all
    A,
    G,
    span,  # assignments of a block
    E: tl.constexpr,
    B: tl.constexpr,
    STEP: tl.constexpr,
):
    """Loads of one block. Grid: (ceil(A / span), ceil(E / B))."""
    block = tl.program_id(0)
    first = tl.program_id(1) * B
    start = block * span
    count = tl.minimum(span, A - start)
    loads_B = tl.zeros((B,), tl.int32)
    for step in range(0, count, STEP):
        within_S = step + tl.arange(0, STEP)
        a_S = start + within_S
        expert_S = experts_here(experts_ptr, map_ptr, a_S, within_S < count, G, E)
        mine = (expert_S >= first) & (expert_S < first + B)
        loads_B += tl.histogram(tl.where(mine, expert_S - first, 0), B, mask=mine)
    e_B = first + tl.arange(0, B)
    tl.store(counts_ptr + block * E + e_B, loads_B, mask=e_B < E)
    tl.atomic_add(loads_ptr + e_B, loads_B, mask=loads_B > 0, sem="relaxed")


@triton.jit(do_not_specialize=["A", "G", "span"])
def place_kernel(
    experts_ptr,  # int32 or int64 [A]
    map_ptr,  # int32 [G], or None
    counts_ptr,  # int32 [blocks, E], of count_kernel
    loads_ptr,  # int32 [E], of count_kernel
    order_ptr,  # int32 [A], written up to the last seat
    offsets_ptr,  # int32 [E + 1], written
    A,
    G,
    span,
    E: tl.constexpr,
    B: tl.constexpr,
    STEP: tl.constexpr,
):
    """Seats of one block, STEP assignments at a time. Grid: (ceil(A / span), ceil(E / B))."""
    block = tl.program_id(0)
    first = tl.program_id(1) * B
    b = tl.arange(0, B)
    e_B = first + b
    loads_B = tl.load(loads_ptr + e_B, mask=e_B < E, other=0)
    seat_B = tl.cumsum(loads_B, 0) - loads_B  # the next seat of each expert
    for lower in range(0, first, B):
        seat_B += tl.sum(tl.load(loads_ptr + lower + b), 0)
    if block == 0:
        if first == 0:
            tl.store(offsets_ptr, 0)
        tl.store(offsets_ptr + 1 + e_B, seat_B + loads_B, mask=e_B < E)
    for earlier in range(0, block, STEP):
        blocks_S = earlier + tl.arange(0, STEP)
        at = counts_ptr + blocks_S[:, None] * E + e_B[None, :]
        mask = (blocks_S < block)[:, None] & (e_B < E)[None, :]
        seat_B += tl.sum(tl.load(at, mask=mask, other=0), 0)

    start = block * span
    count = tl.minimum(span, A - start)
    for step in range(0, count, STEP):
        within_S = step + tl.arange(0, STEP)
        a_S = start + within_S
        expert_S = experts_here(experts_ptr, map_ptr, a_S, within_S < count, G, E)
        here = expert_S[:, None] == e_B[None, :]
        rank = tl.cumsum(here.to(tl.int32), 0)  # from 1
        seat_S = tl.sum(tl.where(here, seat_B[None, :] + rank, 0), 1) - 1
        mine = (expert_S >= first) & (expert_S < first + B)
        tl.store(order_ptr + seat_S, a_S, mask=mine)
        seat_B += tl.sum(here.to(tl.int32), 0)
