"""Mixture-of-Experts computation in plain torch, meant for the CPU. Imports torch only.

    out[t] = sum over the experts e that token t holds, ascending, of
             weight[t, e] * (w2[e] @ act(w13[e] @ hidden[t] + b13[e]) + b2[e])

Letters: T tokens, K places per token, H hidden size, I intermediate size, E experts on this rank,
N rows that one matrix product works on (assignments of one expert), G global experts.

How it is fast. A small step is bound by reading weights, a large one by multiplying. Both are
served by one oneDNN product per projection on weights that :func:`prepare_weights` has put into
oneDNN's blocked layout once, with the activation fused into the product. Work and time follow the
assignments that are left: a dropped one is never gathered, multiplied or summed.

Inference only: no gradients. The result repeats bitwise for the same inputs and thread count.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from capmoe_kernels.activations import ACTIVATIONS, Activation, resolve_activation
from capmoe_kernels.checks import check_experts, check_tensor

__all__ = [
    "ACTIVATIONS",
    "PreparedExperts",
    "fused_experts_prepared",
    "fused_experts_torch",
    "prepare_weights",
    "unpack_weights",
]

# Rows of one product. 512 reach the same FLOP/s as 2048 on an EPYC with AVX-512 BF16, keep the
# temporaries of an expert in the cache, and bound the number of shapes that oneDNN compiles.
MAX_ROWS = 512


def _split(act: Activation, h: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up of a projection, along the last dimension."""
    if act.interleaved:
        return h[..., 0::2], h[..., 1::2]
    half = h.shape[-1] // 2
    return h[..., :half], h[..., half:]


@dataclass(frozen=True)
class _Experts:
    """Weights of the experts of one layer on this rank, however they are stored."""

    activation: Activation
    num_experts: int
    hidden_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class _PlainExperts(_Experts):
    """The weights as the model has them; nothing is copied."""

    w13: Tensor
    w2: Tensor
    b13: Tensor | None
    b2: Tensor | None

    def forward(self, expert: int, x_NH: Tensor) -> Tensor:
        h = F.linear(x_NH, self.w13[expert], None if self.b13 is None else self.b13[expert])
        act = self.activation
        a_NI = act.compute(*_split(act, h)) if act.gated else act.compute(h)
        return F.linear(a_NI, self.w2[expert], None if self.b2 is None else self.b2[expert])


@dataclass(frozen=True)
class PreparedExperts(_Experts):
    """Weights in oneDNN's blocked layout, one opaque tensor per expert and projection.

    Built by :func:`prepare_weights`, used by :func:`fused_experts_prepared`. Biases are plain
    tensors; ``up`` is empty for an activation without a gate.
    """

    gate: tuple[Tensor, ...]
    up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]
    gate_bias: tuple[Tensor | None, ...]
    up_bias: tuple[Tensor | None, ...]
    down_bias: tuple[Tensor | None, ...]

    def forward(self, expert: int, x_NH: Tensor) -> Tensor:
        linear = torch.ops.mkldnn._linear_pointwise
        act, gate, b_gate = self.activation, self.gate[expert], self.gate_bias[expert]
        post = act.fused
        name, algorithm = post or ("none", "")
        a_NI = linear(x_NH, gate, b_gate, name, [], algorithm)
        if act.gated:
            up, b_up = self.up[expert], self.up_bias[expert]
            if post is not None:
                # The product of gate and up happens on the float32 accumulator of the up product.
                a_NI = linear.binary(x_NH, a_NI, up, b_up, "mul")
            else:
                a_NI = act.compute(a_NI, linear(x_NH, up, b_up, "none", [], ""))
        elif post is None:
            a_NI = act.compute(a_NI)
        return linear(a_NI, self.down[expert], self.down_bias[expert], "none", [], "")


@functools.lru_cache(maxsize=8)
def _can_pack(dtype: torch.dtype) -> bool:
    """Whether this build and CPU have oneDNN's prepacked linear for `dtype`, found by trying."""
    try:
        w = torch.ones(32, 32, dtype=dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(w)
        y = torch.ops.mkldnn._linear_pointwise(w, packed, None, "swish", [], "")
        y = torch.ops.mkldnn._linear_pointwise.binary(w, y, packed, None, "mul")
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return bool((y == 1024).all())


@torch.no_grad()
def prepare_weights(
    w13: Tensor,
    w2: Tensor,
    *,
    activation: str,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    swiglu_alpha: float | None = None,
    swiglu_beta: float | None = None,
    swiglu_limit: float | None = None,
    situ_beta: float | None = None,
    situ_linear_beta: float | None = None,
    release: bool = False,
) -> PreparedExperts | None:
    """Repack the experts of a layer once, after loading. Arguments as :func:`fused_experts_torch`.

    Returns None where oneDNN has no prepacked product (a GPU, float16 on a CPU without it): then
    call :func:`fused_experts_torch` with the weights as they are.

    The packed copy takes the room of the original (block sizes round odd shapes up). With
    ``release=True`` `w13` is freed before `w2` is packed, then `w2`, so at most one of the two
    is held twice: their ``.data`` becomes a zero of the same shape without memory behind it.
    """
    act = resolve_activation(
        activation, swiglu_alpha, swiglu_beta, swiglu_limit, situ_beta, situ_linear_beta
    )
    check_experts(w13, w2, w13_bias, w2_bias, act.gated)
    num_experts, hidden, intermediate = w2.shape
    if w13.device.type != "cpu" or not _can_pack(w13.dtype) or 0 in (hidden, intermediate):
        return None
    dtype = w13.dtype
    pack = torch.ops.mkldnn._reorder_linear_weight
    gate: list[Tensor] = []
    up: list[Tensor] = []
    for w_XH in w13.detach():
        if not act.gated:
            gate.append(pack(w_XH.contiguous()))
            continue
        halves = _split(act, w_XH.t())
        gate.append(pack(halves[0].t().contiguous()))
        up.append(pack(halves[1].t().contiguous()))
    if release:
        w13.data = w13.new_zeros(()).expand(w13.shape)
    down = tuple(pack(w_HI.contiguous()) for w_HI in w2.detach())
    if release:
        w2.data = w2.new_zeros(()).expand(w2.shape)

    nothing: tuple[Tensor | None, ...] = (None,) * num_experts
    gate_bias = up_bias = down_bias = nothing
    if w13_bias is not None:
        bias = w13_bias.detach().to(dtype)
        b_gate, b_up = _split(act, bias) if act.gated else (bias, None)
        gate_bias = tuple(b_gate.clone(memory_format=torch.contiguous_format))
        if b_up is not None:
            up_bias = tuple(b_up.clone(memory_format=torch.contiguous_format))
    if w2_bias is not None:
        down_bias = tuple(w2_bias.detach().to(dtype).clone())
    biases = (gate_bias, up_bias, down_bias)
    return PreparedExperts(act, num_experts, hidden, dtype, tuple(gate), tuple(up), down, *biases)


@torch.no_grad()
def unpack_weights(prepared: PreparedExperts) -> tuple[Tensor, Tensor]:
    """`w13` and `w2` as :func:`prepare_weights` took them, bit for bit, contiguous."""
    act = prepared.activation
    gate = torch.stack([packed.to_dense() for packed in prepared.gate])
    if act.gated:
        up = torch.stack([packed.to_dense() for packed in prepared.up])
        gate = (
            torch.stack([gate, up], 2).flatten(1, 2)
            if act.interleaved
            else torch.cat([gate, up], 1)
        )
    return gate, torch.stack([packed.to_dense() for packed in prepared.down])


@torch.no_grad()
def fused_experts_torch(
    hidden_TH: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    *,
    activation: str,
    expert_map: Tensor | None = None,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    swiglu_alpha: float | None = None,
    swiglu_beta: float | None = None,
    swiglu_limit: float | None = None,
    situ_beta: float | None = None,
    situ_linear_beta: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Weighted sum of expert outputs, from weights as the model has them. Returns [T, H].

    Args:
        hidden_TH: bfloat16, float16 or float32 [T, H].
        w13: gate and up projection [E, 2I, H] in the dtype of `hidden_TH`, gates first, or
            interleaved for ``swigluoai``; [E, I, H] for the ``_no_mul`` activations.
        w2: down projection [E, H, I].
        weights_TK: float32 [T, K]; not read where the assignment is dropped.
        experts_TK: int32 or int64 [T, K], any K; -1 = unused or dropped, costs nothing.
        activation: one of ``ACTIVATIONS`` (vLLM's names).
        expert_map: int32 [G], global expert -> expert here, -1 = not on this rank. None: the ids
            in `experts_TK` are already 0..E-1.
        w13_bias, w2_bias: [E, 2I] (or [E, I]) and [E, H]. With tensor parallelism hand `w2_bias`
            to one rank only; this function sums nothing across ranks.
        apply_router_weight_on_input: multiply the expert's input row instead of its output. vLLM's
            modular kernels have done that before the experts run; then hand weights of one.
        swiglu_alpha, swiglu_beta, swiglu_limit: (up + beta) * gate * sigmoid(alpha * gate), gate
            cut at limit from above, up to [-limit, limit]. None is vLLM's default: 1.702, 1, 7 for
            ``swigluoai``; 1, 0 and a limit that must be given for ``swigluoai_uninterleave``; no
            limit for ``silu``; 7 for ``swiglustep``. Unused by the others.
        situ_beta, situ_linear_beta: parameters of ``situ``.
        out: result buffer [T, H], may be `hidden_TH` itself.

    Sums are float32, over experts in ascending order; each expert's own output is rounded to the
    input dtype once.

    Raises:
        ValueError: a shape, dtype, id or activation that does not fit; names both values.

    Example: T=1, H=I=1, K=2, ``relu2_no_mul``, w13 = [[[1]], [[2]]], w2 = [[[1]], [[10]]]. Hidden 3
    held by expert 0 with weight .5 and expert 1 with weight .1: .5 * 3^2 + .1 * 10 * 6^2 = 40.5.
    """
    act = resolve_activation(
        activation, swiglu_alpha, swiglu_beta, swiglu_limit, situ_beta, situ_linear_beta
    )
    check_experts(w13, w2, w13_bias, w2_bias, act.gated)
    b13 = None if w13_bias is None else w13_bias.to(w13.dtype)
    b2 = None if w2_bias is None else w2_bias.to(w2.dtype)
    experts = _PlainExperts(act, w13.shape[0], w13.shape[2], w13.dtype, w13, w2, b13, b2)
    return _run(
        hidden_TH, experts, weights_TK, experts_TK, expert_map, apply_router_weight_on_input, out
    )


@torch.no_grad()
def fused_experts_prepared(
    hidden_TH: Tensor,
    experts: PreparedExperts,
    weights_TK: Tensor,
    experts_TK: Tensor,
    *,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`fused_experts_torch` from weights that :func:`prepare_weights` has packed."""
    return _run(
        hidden_TH, experts, weights_TK, experts_TK, expert_map, apply_router_weight_on_input, out
    )


def _run(
    hidden_TH: Tensor,
    experts: _PlainExperts | PreparedExperts,
    weights_TK: Tensor,
    experts_TK: Tensor,
    expert_map: Tensor | None,
    weight_on_input: bool,
    out: Tensor | None,
) -> Tensor:
    """Validate, then gather, compute and add one expert after the other."""
    _check_call(hidden_TH, experts, weights_TK, experts_TK, expert_map, out)
    result = torch.empty_like(hidden_TH) if out is None else out
    hidden_TH = hidden_TH.contiguous()
    rows_S, slots_S, counts_E = _assignments(experts_TK, experts.num_experts, expert_map)
    if not any(counts_E):
        return result.zero_()
    weights_S1 = weights_TK.reshape(-1).index_select(0, slots_S).unsqueeze(1)
    acc_TH = torch.zeros(hidden_TH.shape, dtype=torch.float32, device=hidden_TH.device)
    start = 0
    for group in _groups(counts_E):
        # A block's padding are rows of the next block or of token 0, cut off after its product.
        starts = [0, *accumulate(rows for _, rows in group)]
        end = start + starts.pop()
        last = start + max(at + padded_rows(n) for at, (_, n) in zip(starts, group, strict=True))
        x_NH = hidden_TH.index_select(0, rows_S[start:last])
        if weight_on_input:
            x_NH = (x_NH * weights_S1[start:last]).to(hidden_TH.dtype)
        parts = [
            experts.forward(expert, x_NH[at : at + padded_rows(rows)])[:rows]
            for at, (expert, rows) in zip(starts, group, strict=True)
        ]
        y_NH = parts[0] if len(parts) == 1 else torch.cat(parts)
        y_NH = y_NH.float() if weight_on_input else y_NH * weights_S1[start:end]
        acc_TH.index_add_(0, rows_S[start:end], y_NH)
        start = end
    return result.copy_(acc_TH)


def padded_rows(rows: int) -> int:
    """`rows` rounded up so that few distinct sizes occur: exact to 32, then 16 sizes per octave.

    oneDNN compiles each new number of rows, about 0.5 ms a time; a size at most 1/16 larger
    costs less than that. ``padded_rows(32) == 32``, ``padded_rows(100) == 100``,
    ``padded_rows(101) == 104``.
    """
    step = 1 << max(0, (rows - 1).bit_length() - 5)
    return -(-rows // step) * step


def _groups(counts_E: list[int]) -> list[list[tuple[int, int]]]:
    """Cut the assignments into groups that are gathered and summed at once.

    A group is a list of (expert, rows), at most ``MAX_ROWS`` rows in all: many experts of a small
    step, or one even share of an expert that has more rows than that.
    """
    groups: list[list[tuple[int, int]]] = []
    room = 0
    for expert, count in enumerate(counts_E):
        if count == 0:
            continue
        share = -(-count // -(-count // MAX_ROWS))
        while count:
            rows = min(share, count)
            if rows > room:
                groups.append([])
                room = MAX_ROWS
            groups[-1].append((expert, rows))
            room -= rows
            count -= rows
    return groups


def _assignments(
    experts_TK: Tensor, num_experts: int, expert_map: Tensor | None
) -> tuple[Tensor, Tensor, list[int]]:
    """Sort what is not dropped by (expert, token).

    Returns the tokens and the places t*K + k of the S assignments, both with room for padding at
    the end (token 0, place 0), and the number of assignments of each expert.
    """
    local = experts_TK.reshape(-1)
    low, high = (int(v) for v in local.aminmax()) if local.numel() else (-1, -1)
    num_ids = num_experts if expert_map is None else expert_map.shape[0]
    if low < -1 or high >= num_ids:
        raise ValueError(
            f"experts_TK holds ids {low} to {high}, but they must be from -1 to {num_ids - 1}."
        )
    if expert_map is not None:
        # A last entry -1 serves the index -1.
        with_none = torch.cat([expert_map, expert_map.new_full((1,), -1)])
        local = with_none[local.long()]
        if local.numel() and int(local.max()) >= num_experts:
            raise ValueError(
                f"expert_map leads to expert {int(local.max())}, but it must be at most "
                f"{num_experts - 1}: w13 holds {num_experts}."
            )
    order = local.argsort(stable=True)
    counts: list[int] = torch.bincount(local + 1, minlength=num_experts + 1).tolist()
    slots_S = torch.cat([order[counts[0] :], order.new_zeros(MAX_ROWS // 32)])
    return slots_S // max(1, experts_TK.shape[1]), slots_S, counts[1:]


def _check_call(
    hidden_TH: Tensor,
    experts: _Experts,
    weights_TK: Tensor,
    experts_TK: Tensor,
    expert_map: Tensor | None,
    out: Tensor | None,
) -> None:
    """ValueError unless the tensors of one call fit each other and the weights."""
    shape: tuple[int | str, ...] = ("T", experts.hidden_size)
    check_tensor("hidden_TH", hidden_TH, dtypes=[experts.dtype], shape=shape, fits="w13")
    ids, shape = [torch.int32, torch.int64], (hidden_TH.shape[0], "K")
    check_tensor("experts_TK", experts_TK, dtypes=ids, shape=shape, fits="hidden_TH")
    check_tensor(
        "weights_TK", weights_TK, dtypes=[torch.float32], shape=experts_TK.shape, fits="experts_TK"
    )
    check_tensor("expert_map", expert_map, dtypes=[torch.int32], shape=("E",), optional=True)
    check_tensor(
        "out",
        out,
        dtypes=[hidden_TH.dtype],
        shape=hidden_TH.shape,
        fits="hidden_TH",
        optional=True,
    )
