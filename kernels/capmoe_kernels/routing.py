"""Capacity-aware routing by Triton kernels: `route_triton`, from scores or router logits.

Letters: T tokens (rows), E experts, k per token, m extra candidates, W places per token
(W = k, or what Expanded Drop allows), G groups (1, or one per request), D devices, X = 1 or D.

The method is that of arXiv 2503.05066 as `vllm_capmoe.torch_routing.route_torch` has it, whose
integers come out here bit for bit, in four launches and one that zeroes sums (one less where no
limit can be in effect, one more with decode keep, two more for reroute), the number of which
depends on shapes, the plan and which tensors are given. Nothing is read back to the host and no
size depends on a value, so a CUDA graph can hold a call (after one of the same sizes, which
compiles the kernels and builds the tables). There is no sort of the assignments.
`kernels/README.md` has the algorithm, its costs and its limits.

Run under Triton's interpreter (TRITON_INTERPRET=1 before the first import of triton) the same
functions take CPU tensors.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from capmoe_kernels import _routing_kernels, _routing_limits, _routing_reroute, _routing_sharing
from capmoe_kernels._routing_arguments import (
    flat,
    ids,
    ints,
    mask,
    on_device_of_scores,
    options,
    rows,
    up_to_four,
)
from capmoe_kernels._routing_checks import check_one, check_plan, check_scores, check_tables
from capmoe_kernels._routing_launch import (
    first_draw,
    keep_table,
    launch_config,
    power_of_two,
)
from capmoe_kernels.capacity import capacity_table
from capmoe_kernels.checks import INTEGERS, check_contiguous
from capmoe_kernels.contract import NO_LIMIT, SCORINGS, TOTALS, Plan, Seats, Selection
from capmoe_kernels.launch import ceil_div
from capmoe_kernels.tables import Tables

__all__ = [
    "INTERPRETED",
    "NO_LIMIT",
    "SCORINGS",
    "Plan",
    "TOTALS",
    "Seats",
    "Selection",
    "Tables",
    "route_triton",
]

INTERPRETED = not isinstance(_routing_kernels.choose_kernel, triton.JITFunction)
"""Whether the kernels run under Triton's interpreter, which was decided at their import."""


@on_device_of_scores
def route_triton(
    scores_TE: Tensor,
    plan: Plan,
    *,
    scoring: str | None = None,
    topk_TK: Tensor | None = None,
    is_padding_T: Tensor | None = None,
    is_decode_T: Tensor | None = None,
    request_T: Tensor | None = None,
    num_requests: int = 1,
    is_image_T: Tensor | None = None,
    device_E: Tensor | None = None,
    token_device_T: Tensor | None = None,
    seed: int = 0,
    counters: Tensor | None = None,
    tables: Tables | None = None,
) -> Selection:
    """Decode keep, then Token Drop, Expanded Drop or reroute, as `route_torch` does them.

    scores_TE: float [T, E], compared as float32; with `scoring`, router logits. plan: resolved for
        E and k.
    scoring: how scores are made of router logits, a name of `SCORINGS`: in float32, divisions as
        IEEE has them. They may differ from torch's in the last bits, so that a near tie may go the
        other way; given the scores of this function all integers are those of `route_torch`.
    topk_TK: int [T, k], the model's own choice, in [0, E) and distinct in the rows of real
        tokens; ids out of range are moved to the nearest expert.
    is_padding_T, is_decode_T, is_image_T: bool [T] or None. is_image_T is used if the plan has a
        priority.
    request_T: int [T] in [0, num_requests) for real tokens, used at scope request. In any order,
        but rows of one request should be neighbours, as they are in vLLM: the time of a request
        goes by the rows from its first to its last one. A row with another number is padding.
    device_E, token_device_T: int [E] and [T], used at level device and for local candidates.
    seed: for metric random.
    counters: int64 [2 * E + len(TOTALS)] or None; the step is added to it: its loads before, its
        loads after, then what `contract.COUNTERS` says.
    tables: what is read in the place of `gamma` and `keeps` of the plan, which are not looked at
        then; None: they are, and their tables are built by the first call of a size, which must
        not be in the capture of a CUDA graph.

    Time is linear in T * E * (k + m). All integers equal those of `route_torch`; so do the bits of
    the weights, but those of NaN. No gradients. Raises ValueError for what does not fit, before
    any launch; values of tensors are not checked, and none makes a kernel leave its tensors.
    """
    at_device, by_request = plan.level == "device", plan.scope == "request"
    by_image = plan.mode != "off" and plan.priority != "uniform"
    local = plan.local and plan.extra > 0
    if scoring is not None and scoring not in SCORINGS:
        raise ValueError(f"scoring is {scoring!r}, but it must be one of {', '.join(SCORINGS)}.")
    check_scores(scores_TE, plan, INTERPRETED)
    T, E = scores_TE.shape
    check_plan(plan, T, num_requests if by_request else 1)
    check_one("topk_TK", topk_TK, INTEGERS, (T, plan.top_k), scores_TE, False)
    check_one("is_padding_T", is_padding_T, (torch.bool,), (T,), scores_TE, False)
    check_one("is_decode_T", is_decode_T, (torch.bool,), (T,), scores_TE, False)
    check_one("request_T", request_T, INTEGERS, (T,), scores_TE, by_request)
    check_one("is_image_T", is_image_T, (torch.bool,), (T,), scores_TE, by_image)
    check_one("device_E", device_E, INTEGERS, (E,), scores_TE, at_device or local)
    check_one("token_device_T", token_device_T, INTEGERS, (T,), scores_TE, local)
    check_one("counters", counters, (torch.int64,), (2 * E + len(TOTALS),), scores_TE, False)
    if counters is not None:
        check_contiguous("counters", counters)

    G, B, X = num_requests if by_request else 1, plan.num_bins, len(plan.bin_sizes)
    K, W = plan.top_k, plan.width
    device = scores_TE.device

    # Whether any limit can be in effect, whatever the tensors hold.
    limited, limits, least = False, None, 0
    keeps = keep_table(plan.keeps, device) if plan.keeps and tables is None else None
    if tables is not None:
        check_tables(tables, plan, T, device)
        limits, least, keeps = tables.limits, tables.least, tables.keeps
    elif plan.mode != "off" and plan.gamma is not None and T > 0:
        limits, least = capacity_table(plan, T, device)
    if limits is not None:
        least = max(least, plan.min_tokens)
        limited = least <= T
    if is_decode_T is None:
        keeps = None
    sharing = keeps is not None
    bins = min(G, T // max(least, 1)) * B  # of groups that may have a limit
    M = plan.extra if limited else 0
    L = K + M
    reroutes = plan.mode == "reroute" and M > 0
    M0 = 0 if reroutes else M  # extra candidates from the start

    # What is returned, and what is counted from zero: one launch.
    E4, G4 = up_to_four(E), up_to_four(G)
    counted = G * B if limited and plan.busiest else 0
    sizes = [12, E4, E4, 4 * G4, up_to_four(E + 1) if sharing else 0, up_to_four(counted)]
    sums = torch.zeros(sum(sizes) // 2, dtype=torch.int64, device=device)
    totals, sums_32 = sums[:5], sums.view(torch.int32).split(sizes)
    load_before, load_after = sums_32[1][:E], sums_32[2][:E]
    groups = sums_32[3][: 4 * G] if limited else None
    loaded = sums_32[4][: E + 1] if sharing else None
    bin_loads = sums_32[5][:counted] if counted else None
    experts = ints(device, T, W)
    weights = torch.empty((T, W), dtype=torch.float32, device=device)
    capacity = ints(device, G, X)
    seats = Seats(order=ints(device, T * W), offsets=ints(device, E + 1), seat=ints(device, T, W))
    selection = Selection(
        experts=experts,
        weights=weights,
        load_before=load_before,
        load_after=load_after,
        capacity=capacity,
        kept=totals[0],
        left_without=totals[1],
        mass=totals[2],
        lost=totals[3],
        prompts=totals[4],
        seats=seats,
    )
    if T == 0:
        capacity.fill_(NO_LIMIT)
        seats.offsets.zero_()
        return selection

    config = launch_config(T, E, L)
    EP, LP, WP = max(power_of_two(E), 2), power_of_two(L), power_of_two(W)
    blocks = ceil_div(T, config.rows)
    tags = ints(device, T)
    candidates = ints(device, L, T)
    candidate_scores = torch.empty((L, T), dtype=torch.float32, device=device)
    counts = ints(device, blocks, E)
    keys = ints(device, E, T) if limited and not at_device else None
    decode_keys = ints(device, T, E) if sharing else None
    rest = ints(device, E, T) if reroutes else None
    free = ints(device, G, B) if reroutes else None
    last_bids, given_bids, index = None, None, None
    bin_device = flat(device_E) if limited and at_device else None
    if limited:
        last_bids = torch.empty((G, B), dtype=torch.int64, device=device)
        if plan.metric == "random":
            index = ints(device, T)
    start = first_draw(seed)

    scores_TE = rows(scores_TE)
    topk_TK = None if topk_TK is None else rows(ids(topk_TK))
    _routing_kernels.choose_kernel[(ceil_div(T, config.choose_rows),)](
        scores_TE,
        scores_TE.stride(0),
        topk_TK,
        0 if topk_TK is None else topk_TK.stride(0),
        mask(is_padding_T),
        mask(is_decode_T),
        flat(request_T) if limited and by_request else None,
        mask(is_image_T) if limited and by_image else None,
        flat(device_E) if M > 0 and local else None,
        flat(token_device_T) if M > 0 and local else None,
        candidates,
        candidate_scores,
        keys,
        tags,
        groups,
        load_before,
        keeps,
        loaded,
        decode_keys,
        rest,
        bin_device if counted else None,
        bin_loads,
        T,
        G,
        E=E,
        EP=EP,
        K=K,
        M=M0,
        B=B,
        KEEPS=0 if keeps is None else len(keeps),
        TEXT_LAST=plan.priority == "text-first",
        SCORING=scoring or "none",
        BLOCK_T=config.choose_rows,
        **options(config.choose_warps),
    )
    if sharing:
        _routing_sharing.share_kernel[(ceil_div(T, config.choose_rows),)](
            scores_TE,
            scores_TE.stride(0),
            tags,
            candidates,
            candidate_scores,
            keys,
            decode_keys,
            loaded,
            bin_device if counted else None,
            bin_loads,
            totals,
            T,
            E=E,
            EP=EP,
            K=K,
            B=B,
            SCORING=scoring or "none",
            BLOCK_T=config.choose_rows,
            **options(config.choose_warps),
        )
    if limited:
        _routing_limits.limit_kernel[(bins,)](
            tags,
            candidates,
            candidate_scores,
            keys,
            bin_device,
            groups,
            limits,
            capacity,
            last_bids,
            bin_loads,
            free,
            index,
            T,
            G,
            start,
            plan.min_tokens,
            least,
            E=E,
            L=K + M0,
            B=B,
            X=X,
            METRIC=plan.metric,
            BLOCK=config.limit_rows,
            **options(config.limit_warps),
        )
    if reroutes:
        given_bids = torch.empty((G, B), dtype=torch.int64, device=device)
        _routing_reroute.reroute_kernel[(ceil_div(T, config.choose_rows),)](
            scores_TE,
            scores_TE.stride(0),
            tags,
            candidates,
            candidate_scores,
            rest,
            bin_device,
            capacity,
            last_bids,
            free,
            index,
            T,
            start,
            E=E,
            EP=EP,
            K=K,
            M=M,
            B=B,
            X=X,
            METRIC=plan.metric,
            SCORING=scoring or "none",
            BLOCK_T=config.choose_rows,
            **options(config.choose_warps),
        )
        _routing_reroute.give_kernel[(bins,)](
            tags,
            candidates,
            candidate_scores,
            None if at_device else rest,
            bin_device,
            groups,
            capacity,
            free,
            given_bids,
            T,
            G,
            start,
            least,
            E=E,
            K=K,
            M=M,
            B=B,
            X=X,
            METRIC=plan.metric,
            BLOCK=config.limit_rows,
            **options(config.limit_warps),
        )
    _routing_kernels.pack_kernel[(blocks,)](
        tags,
        candidates,
        candidate_scores,
        bin_device,
        capacity,
        last_bids,
        given_bids,
        index,
        experts,
        weights,
        counts,
        load_after,
        totals,
        T,
        G,
        start,
        E=E,
        EP=EP,
        L=L,
        LP=LP,
        W=W,
        WP=WP,
        B=B,
        X=X,
        METRIC=plan.metric,
        LIMITED=limited,
        RENORMALIZE=plan.renormalize,
        SORT=reroutes and topk_TK is not None,
        ROWS=config.rows,
        BLOCK_T=config.pack_rows,
        **options(config.pack_warps),
    )
    _routing_kernels.seats_kernel[(blocks,)](
        experts,
        counts,
        load_after,
        load_before,
        totals,
        seats.order,
        seats.offsets,
        seats.seat,
        counters,
        T,
        E=E,
        EP=EP,
        W=W,
        WP=WP,
        ROWS=config.rows,
        BLOCK_T=config.seat_rows,
        CHUNK=config.seat_chunk,
        **options(config.seat_warps),
    )
    return selection
