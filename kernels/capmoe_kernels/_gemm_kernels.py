"""Triton kernels of the experts: gate/up product, down product, combine. Launched by experts.py.

Letters: T tokens, W places per token, A = T*W assignments (a = t*W + w), H hidden size,
I intermediate size, E experts here, P the power of two at or above E, M/N/K the sides of a tile.

A *seat* is a position in ``order`` [A], which lists the assignments grouped by expert; expert e
owns the seats ``offsets[e] .. offsets[e+1] - 1``. Entries of ``order`` past ``offsets[E]`` are
never read. No program reads a value that the host would have to know: the grid has a fixed number
of programs, and each walks the tiles that the loads of the experts give.

Offsets into tensors are int64 wherever rows, experts or seats are multiplied by a stride; tile
numbers, rows and columns are int32.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from capmoe_kernels._activation_kernels import activate_one, activate_pair


@triton.jit
def after_previous_kernel(PDL: tl.constexpr):
    """With programmatic dependent launch: wait for the kernel before, let the next one start.

    The next one's first act is this wait, too, so it reads nothing too early.
    """
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def load_tiles(offsets_ptr, E: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr):
    """M-tiles of each expert [P] and their inclusive prefix sums [P]; zero loads past E."""
    experts_P = tl.arange(0, P)
    begin_P = tl.load(offsets_ptr + experts_P, mask=experts_P < E, other=0)
    end_P = tl.load(offsets_ptr + experts_P + 1, mask=experts_P < E, other=0)
    tiles_P = (end_P - begin_P + BLOCK_M - 1) // BLOCK_M
    return tiles_P, tl.cumsum(tiles_P, 0)


@triton.jit
def find_tile(
    tile,
    tiles_P,
    ends_P,
    offsets_ptr,
    N_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Expert, first seat, end of the expert's seats and n-tile of tile number `tile`.

    Tiles run expert by expert; within one, blocks of GROUP_M m-tiles, n-tiles of a block, m-tiles
    of an n-tile. So neighbours in time share a weight tile, and a block's activations stay in L2.
    """
    passed_P = ends_P * N_TILES <= tile
    expert = tl.sum(passed_P.to(tl.int32), 0)
    first = tl.sum(tl.where(passed_P, tiles_P, 0), 0)
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    m_tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    local = tile - first * N_TILES
    block = local // (GROUP_M * N_TILES)
    rest = local - block * (GROUP_M * N_TILES)
    size = tl.minimum(m_tiles - block * GROUP_M, GROUP_M)
    pid_m = block * GROUP_M + rest % size
    return expert, begin + pid_m * BLOCK_M, end, rest // size


@triton.jit
def multiply(x, w, acc, SWAP_AB: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + x @ w.T, or its transpose acc + w @ x.T.

    Triton's interpreter has no bfloat16 dot: there in float32, which changes no product.
    """
    if INTERPRETED:
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    if SWAP_AB:
        return tl.dot(w, x.T, acc, input_precision=PRECISION)
    else:
        return tl.dot(x, w.T, acc, input_precision=PRECISION)


@triton.jit
def narrow(x, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 to DTYPE, to nearest even. Triton's interpreter cuts bfloat16 off: rounded before."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def load_rows(
    w,
    expert,
    row,
    k,
    rows_N,
    ok_N,
    STRIDE_E: tl.constexpr,
    STRIDE_N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    PAIRED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Tile [BLOCK_N, BLOCK_K] of an expert's matrix [.., K], zero outside of it.

    By a descriptor: BLOCK_N rows from `row`, or with PAIRED half of them in each half of the
    matrix (gates, then ups). By pointers: the rows `rows_N` (int64) where `ok_N`. WHOLE: no
    tile reaches past column K.
    """
    if USE_TMA:
        tile = w.load([expert, 0, row, k]) if PAIRED else w.load([expert, row, k])
        return tile.reshape(BLOCK_N, BLOCK_K)
    else:
        cols_K = k + tl.arange(0, BLOCK_K)
        ptrs = w + expert.to(tl.int64) * STRIDE_E + rows_N[:, None] * STRIDE_N + cols_K[None, :]
        mask = ok_N[:, None]
        if not WHOLE:
            mask = mask & (cols_K[None, :] < K)
        return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_programs", "num_rows"])
def gate_up_kernel(
    hidden_ptr,  # [T, H], last stride 1
    w13,  # descriptor of, or pointer to, [E, 2I, H] (or [E, I, H])
    bias_ptr,  # [E, 2I] (or [E, I]) contiguous, or None
    weights_ptr,  # float32 [A], read where MUL_WEIGHT
    order_ptr,  # int32 [A]
    offsets_ptr,  # int32 [E + 1]
    out_ptr,  # [A, I] contiguous, in seat order; [R, I] with num_rows
    num_programs,
    num_rows,  # R, the most seats, past which nothing is stored; None: there are A
    HIDDEN_STRIDE: tl.constexpr,
    W13_STRIDE_E: tl.constexpr,
    W13_STRIDE_N: tl.constexpr,
    E: tl.constexpr,
    P: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    W: tl.constexpr,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    LIMIT: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    MUL_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    USE_TMA: tl.constexpr,
    SWAP_AB: tl.constexpr,
    FLATTEN: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[seat] = act(w13[e] @ hidden[order[seat] // W] + bias[e]).

    One accumulator of BLOCK_N columns holds a gate tile and its up tile: one matrix instruction
    makes both, and they meet in registers. SWAP_AB computes the transpose, for few tokens: the
    weights take the tensor core's long side. Then gates and ups (unless interleaved) have an
    accumulator each, since the left operand can't be read from shared memory in two halves.
    """
    OUT_N: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    N_TILES: tl.constexpr = (I + OUT_N - 1) // OUT_N
    HALVES: tl.constexpr = GATED and not INTERLEAVED
    TWO: tl.constexpr = HALVES and SWAP_AB
    PER: tl.constexpr = 2 if INTERLEAVED else 1  # rows of w13 per column, from one to the next
    ROWS: tl.constexpr = OUT_N if TWO else BLOCK_N  # of w13 per load
    PAIRED: tl.constexpr = HALVES and not TWO
    WHOLE: tl.constexpr = H % BLOCK_K == 0
    after_previous_kernel(PDL)
    tiles_P, ends_P = load_tiles(offsets_ptr, E, P, BLOCK_M)
    num_tiles = tl.sum(tiles_P, 0) * N_TILES
    for tile in tl.range(
        tl.program_id(0),
        num_tiles,
        num_programs,
        flatten=FLATTEN,
        warp_specialize=WARP_SPECIALIZE,
    ):
        expert, seat, end, pid_n = find_tile(
            tile, tiles_P, ends_P, offsets_ptr, N_TILES, BLOCK_M, GROUP_M
        )
        seats_M = seat + tl.arange(0, BLOCK_M)
        ok_M = seats_M < end
        if num_rows is not None:
            ok_M = ok_M & (seats_M < num_rows)
        slots_M = tl.load(order_ptr + seats_M, mask=ok_M, other=0)
        x_ptrs = hidden_ptr + (slots_M // W).to(tl.int64)[:, None] * HIDDEN_STRIDE
        column = pid_n * OUT_N
        row = column * PER

        j_N = tl.arange(0, ROWS)
        if PAIRED:
            within_N = column + j_N % OUT_N
            ok_N = within_N < I
            rows_N = (within_N + j_N // OUT_N * I).to(tl.int64)
        else:
            ok_N = row + j_N < I * PER
            rows_N = (row + j_N).to(tl.int64)

        if SWAP_AB:
            acc = tl.zeros((ROWS, BLOCK_M), dtype=tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, ROWS), dtype=tl.float32)
        acc_up = acc
        for k in range(0, H, BLOCK_K):
            cols_K = k + tl.arange(0, BLOCK_K)
            x_mask = ok_M[:, None]
            if not WHOLE:
                x_mask = x_mask & (cols_K[None, :] < H)
            x = tl.load(x_ptrs + cols_K[None, :], mask=x_mask, other=0.0)
            w = load_rows(
                w13,
                expert,
                row,
                k,
                rows_N,
                ok_N,
                W13_STRIDE_E,
                W13_STRIDE_N,
                H,
                ROWS,
                BLOCK_K,
                USE_TMA,
                PAIRED,
                WHOLE,
            )
            acc = multiply(x, w, acc, SWAP_AB, PRECISION, INTERPRETED)
            if TWO:
                w_up = load_rows(
                    w13,
                    expert,
                    row + I,
                    k,
                    rows_N + I,
                    ok_N,
                    W13_STRIDE_E,
                    W13_STRIDE_N,
                    H,
                    ROWS,
                    BLOCK_K,
                    USE_TMA,
                    PAIRED,
                    WHOLE,
                )
                acc_up = multiply(x, w_up, acc_up, SWAP_AB, PRECISION, INTERPRETED)
        if SWAP_AB:
            acc = acc.T
            acc_up = acc_up.T

        cols_N = column + tl.arange(0, OUT_N)
        ok_out_N = cols_N < I
        if TWO:
            gate, up = acc, acc_up
        elif INTERLEAVED:
            gate, up = acc.reshape(BLOCK_M, OUT_N, 2).split()
        elif GATED:
            gate, up = acc.reshape(BLOCK_M, 2, OUT_N).permute(0, 2, 1).split()
        else:
            gate, up = acc, acc
        if MUL_WEIGHT:  # of the input row: the product is linear in it
            weight_M = tl.load(weights_ptr + slots_M, mask=ok_M, other=0.0)
            gate = gate * weight_M[:, None]
            up = up * weight_M[:, None]
        if bias_ptr is not None:
            ptrs_N = bias_ptr + expert.to(tl.int64) * (2 * I if GATED else I) + cols_N * PER
            gate += tl.load(ptrs_N, mask=ok_out_N, other=0.0).to(tl.float32)[None, :]
            if GATED:
                ptrs_N += 1 if INTERLEAVED else I
                up += tl.load(ptrs_N, mask=ok_out_N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            y = activate_pair(gate, up, ACT, ALPHA, BETA, LIMIT, INTERPRETED)
        else:
            y = activate_one(gate, ACT, INTERPRETED)

        out_ptrs = out_ptr + seats_M.to(tl.int64)[:, None] * I + cols_N[None, :]
        mask = ok_M[:, None]
        if I % OUT_N != 0:
            mask = mask & ok_out_N[None, :]
        tl.store(out_ptrs, narrow(y, out_ptr.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit(do_not_specialize=["num_programs", "num_rows"])
def down_kernel(
    x,  # descriptor of, or pointer to, [A, I] contiguous, in seat order
    w2,  # descriptor of, or pointer to, [E, H, I]
    bias_ptr,  # [E, H] contiguous, or None
    weights_ptr,  # float32 [A], read where MUL_WEIGHT
    order_ptr,  # int32 [A]
    offsets_ptr,  # int32 [E + 1]
    out_ptr,  # [SPLIT_K, R, H] contiguous, by assignment, or by seat
    seat_of_ptr,  # int32 [A], written where the rows go by seat; None where by assignment
    num_programs,
    num_rows,  # R: A, or the most seats
    W2_STRIDE_E: tl.constexpr,
    W2_STRIDE_N: tl.constexpr,
    E: tl.constexpr,
    P: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    MUL_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    SWAP_AB: tl.constexpr,
    FLATTEN: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[part, order[seat]] = (w2[e] @ x[seat] + bias[e]) * weight[order[seat]].

    With `seat_of_ptr` it is out[part, seat], and seat_of[order[seat]] = seat for the combine.

    With SPLIT_K above one each part holds the sum over its own slice of I, the bias in part 0;
    the combine kernel adds the parts. Rows of x past the expert's last seat belong to the next
    expert, or were never written: they only reach rows of the tile that are not stored.
    """
    H_TILES: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    N_TILES: tl.constexpr = H_TILES * SPLIT_K
    WHOLE: tl.constexpr = I % (BLOCK_K * SPLIT_K) == 0
    # Columns of one part, whole K-tiles.
    PART: tl.constexpr = (I + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K) * BLOCK_K
    after_previous_kernel(PDL)
    tiles_P, ends_P = load_tiles(offsets_ptr, E, P, BLOCK_M)
    num_tiles = tl.sum(tiles_P, 0) * N_TILES
    for tile in tl.range(
        tl.program_id(0),
        num_tiles,
        num_programs,
        flatten=FLATTEN,
        warp_specialize=WARP_SPECIALIZE,
    ):
        expert, seat, end, pid_nk = find_tile(
            tile, tiles_P, ends_P, offsets_ptr, N_TILES, BLOCK_M, GROUP_M
        )
        part = pid_nk // H_TILES
        column = pid_nk % H_TILES * BLOCK_N
        seats_M = seat + tl.arange(0, BLOCK_M)
        ok_M = seats_M < end
        if seat_of_ptr is not None:
            ok_M = ok_M & (seats_M < num_rows)
        cols_N = column + tl.arange(0, BLOCK_N)
        ok_N = cols_N < H

        if SWAP_AB:
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(0, PART, BLOCK_K):
            k = part * PART + step
            if USE_TMA:
                a = x.load([seat, k])
            else:
                cols_K = k + tl.arange(0, BLOCK_K)
                a_mask = ok_M[:, None]
                if not WHOLE:
                    a_mask = a_mask & (cols_K[None, :] < I)
                a_ptrs = x + seats_M.to(tl.int64)[:, None] * I + cols_K[None, :]
                a = tl.load(a_ptrs, mask=a_mask, other=0.0)
            b = load_rows(
                w2,
                expert,
                column,
                k,
                cols_N.to(tl.int64),
                ok_N,
                W2_STRIDE_E,
                W2_STRIDE_N,
                I,
                BLOCK_N,
                BLOCK_K,
                USE_TMA,
                False,
                WHOLE,
            )
            acc = multiply(a, b, acc, SWAP_AB, PRECISION, INTERPRETED)
        if SWAP_AB:
            acc = acc.T

        if bias_ptr is not None:
            bias_N = tl.load(bias_ptr + expert.to(tl.int64) * H + cols_N, mask=ok_N, other=0.0)
            bias_N = bias_N.to(tl.float32)
            if SPLIT_K > 1:
                bias_N = tl.where(part == 0, bias_N, 0.0)
            acc = acc + bias_N[None, :]
        slots_M = tl.load(order_ptr + seats_M, mask=ok_M, other=0)
        if MUL_WEIGHT:
            acc = acc * tl.load(weights_ptr + slots_M, mask=ok_M, other=0.0)[:, None]
        row_M = slots_M.to(tl.int64)
        if seat_of_ptr is not None:
            row_M = seats_M.to(tl.int64)
            tl.store(seat_of_ptr + slots_M, seats_M, mask=ok_M & (pid_nk == 0))
        if SPLIT_K > 1:
            row_M += part.to(tl.int64) * num_rows
        out_ptrs = out_ptr + row_M[:, None] * H + cols_N[None, :]
        mask = ok_M[:, None]
        if H % BLOCK_N != 0:
            mask = mask & ok_N[None, :]
        tl.store(out_ptrs, narrow(acc, out_ptr.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def combine_kernel(
    rows_ptr,  # [SPLIT_K, R, H] contiguous, by assignment, or by seat
    experts_ptr,  # int32 [A]
    map_ptr,  # int32 [G] global expert -> expert here, or None
    seat_of_ptr,  # int32 [A], -1 = no row, where the rows go by seat; None where by assignment
    out_ptr,  # [T, H], last stride 1
    num_rows,  # R
    OUT_STRIDE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[t] = sum over w ascending of sum over parts ascending of rows[part, t*W + w].

    Places without an expert here are not read. The order is fixed, so results repeat bitwise.
    Grid: (T, ceil(H / BLOCK_H)).
    """
    after_previous_kernel(PDL)
    token = tl.program_id(0).to(tl.int64)
    cols_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    ok_H = cols_H < H
    total_H = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for w in range(W):
        slot = token * W + w
        expert = tl.load(experts_ptr + slot)
        if map_ptr is not None:
            expert = tl.load(map_ptr + expert, mask=expert >= 0, other=-1)
        row_of_slot = slot
        if seat_of_ptr is not None:
            seat = tl.load(seat_of_ptr + slot, mask=expert >= 0, other=-1)
            expert = tl.minimum(expert, seat)
            row_of_slot = seat.to(tl.int64)
        mask = cols_H < tl.where(expert >= 0, H, 0)
        for part in tl.static_range(SPLIT_K):
            row = row_of_slot
            if part > 0:
                row += tl.cast(num_rows, tl.int64) * part
            ptrs = rows_ptr + row * H + cols_H
            total_H += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + token * OUT_STRIDE + cols_H
    tl.store(out_ptrs, narrow(total_H, out_ptr.dtype.element_ty, INTERPRETED), mask=ok_H)
